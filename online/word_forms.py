"""Word logits in the form that a key names: likeliest words, random ones, or both.

Shapes: M positions (the leading shape in one), V vocabulary.
"""

import torch
from torch import Tensor

from online.batch import Drawn, TopDrawn, TopK
from online.draws import drawn, top_drawn
from online.vocabulary import nucleus, parts, top_k
from store.forms import WordForm


def in_form(form: WordForm, logits: Tensor, seeds: Tensor) -> TopK | Drawn | TopDrawn:
    """What ``form`` keeps of ``logits`` [..., V]; of each position by itself, so logits may come in parts of any size.

    Args:
        seeds: [...] of each position (online.seeds).

    Raises:
        ValueError: the vocabulary has fewer words than are kept.
    """
    form.check(logits.shape[-1])
    if not form.draws:
        return nucleus(top_k(logits, form.top), form)
    lead, rows_MV = logits.shape[:-1], logits.reshape(-1, logits.shape[-1])
    count, draw = parts(rows_MV, len(rows_MV)), top_drawn if form.top else drawn
    chunks = zip(rows_MV.tensor_split(count), seeds.reshape(-1).tensor_split(count), strict=True)
    found = [draw(chunk_MV.float(), seeds_M, form) for chunk_MV, seeds_M in chunks]
    columns = [torch.cat(column) for column in zip(*found, strict=True)]
    shaped = [column.reshape(*lead, *column.shape[1:]) for column in columns]
    return TopDrawn(*shaped) if form.top else Drawn(*shaped)
