"""The torch half of the codec ``topband``: likeliest words, and the mass of the others in bands of ids.

Logits are float32. Shapes: M tokens, V words, W of them, P of a band, K kept words, B bands.
"""

import torch
from torch import Tensor

from online.batch import TopBanded
from online.vocabulary import top_k
from store.codecs.topband import NONE, STEPS, starts
from store.codecs.topk import UNUSED
from store.forms import WordForm


def top_banded(logits_MV: Tensor, form: WordForm) -> TopBanded:
    """``topKbandB``: as store.codecs.topband says."""
    head = top_k(logits_MV, form.top)
    log_sum_exp_M1 = logits_MV.gather(-1, head.ids[:, :1]) - head.log_probs[:, :1]
    bands_MB = in_bands(logits_MV.scatter(-1, head.ids, -torch.inf), form.bands)
    return TopBanded(head.ids, head.log_probs, codes(bands_MB - log_sum_exp_M1))


def codes(log_bands_MB: Tensor) -> Tensor:
    """What stands for the logarithms of the bands' masses."""
    return (-STEPS * log_bands_MB.clamp(min=UNUSED)).round().clamp(0, NONE)


def in_bands(scores_MW: Tensor, bands: int, vocab: int | None = None, first: int = 0) -> Tensor:
    """[M, B] the log-sum-exp of each band of a vocabulary: of all its words, or of ``vocab`` words W from the word ``first`` on."""
    width = scores_MW.shape[-1]
    ends = [*(min(max(end - first, 0), width) for end in starts(vocab or width, bands)[1:]), width]
    sizes = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    return torch.stack([part_MP.logsumexp(-1) for part_MP in scores_MW.split(sizes, -1)], -1)


def log_masses(codes: Tensor) -> Tensor:
    """Logarithms of the masses that codes stand for, float32 and finite."""
    return (codes / -STEPS).masked_fill(codes == NONE, UNUSED)
