"""Word logits in the form that a key names: likeliest words, random ones, or both.

Shapes: M positions (the leading shape in one), V vocabulary.
"""

import torch
from torch import Tensor

from online.bands import top_banded
from online.batch import Drawn, TopBanded, TopDrawn, TopK
from online.draws import drawn, top_drawn
from online.vocabulary import nucleus, parts, top_k
from store.forms import WordForm


def in_form(form: WordForm, logits: Tensor, seeds: Tensor) -> TopK | Drawn | TopDrawn | TopBanded:
    """What ``form`` keeps of ``logits`` [..., V]; of each position by itself, so logits may come in parts of any size.

    Args:
        seeds: [...] of each position (online.seeds).

    Raises:
        ValueError: the vocabulary has fewer words than are kept.
    """
    form.check(logits.shape[-1])
    if form.codec == "topk":
        return nucleus(top_k(logits, form.top), form)
    lead, rows_MV = logits.shape[:-1], logits.reshape(-1, logits.shape[-1])
    count = parts(rows_MV, len(rows_MV))
    chunks = zip(rows_MV.tensor_split(count), seeds.reshape(-1).tensor_split(count), strict=True)
    found = [_of_chunk(form, chunk_MV.float(), seeds_M) for chunk_MV, seeds_M in chunks]
    columns = [torch.cat(column) for column in zip(*found, strict=True)]
    return type(found[0])(*(column.reshape(*lead, *column.shape[1:]) for column in columns))


def _of_chunk(form: WordForm, logits_MV: Tensor, seeds_M: Tensor) -> Drawn | TopDrawn | TopBanded:
    if form.bands:
        return top_banded(logits_MV, form)
    return top_drawn(logits_MV, seeds_M, form) if form.top else drawn(logits_MV, seeds_M, form)
