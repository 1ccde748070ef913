"""The torch half of the codec ``topband``: likeliest words, and the mass of the others in bands of ids.

Logits are float32. Shapes: M tokens, V words, K kept words, B bands.
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
    log_bands_MB = in_bands(logits_MV.scatter(-1, head.ids, -torch.inf), form.bands) - log_sum_exp_M1
    codes_MB = (-STEPS * log_bands_MB.clamp(min=UNUSED)).round().clamp(0, NONE)
    return TopBanded(head.ids, head.log_probs, codes_MB)


def in_bands(scores_MV: Tensor, bands: int) -> Tensor:
    """[M, B] the log-sum-exp of each band."""
    ends = (*starts(scores_MV.shape[-1], bands)[1:], scores_MV.shape[-1])
    sizes = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    return torch.stack([part_MW.logsumexp(-1) for part_MW in scores_MV.split(sizes, -1)], -1)


def log_masses(codes: Tensor) -> Tensor:
    """Logarithms of the masses that codes stand for, float32 and finite."""
    return (codes / -STEPS).masked_fill(codes == NONE, UNUSED)
