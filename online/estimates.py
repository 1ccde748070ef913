"""What words drawn at random say of a teacher's prediction.

Shapes: U tokens, V words, H head words, D sets of draws, N draws of a set, P places of a set (H + N, or N).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from online.batch import Drawn, TopDrawn
from store.forms import WordForm


class Estimate(NamedTuple):
    """An unbiased estimate t^ of the teacher's probabilities t, of one set of draws."""

    ids: Tensor
    """[U, P] words; one may stand in several places."""
    weights: Tensor
    """[U, P] what each place adds to t^ of its word; 0 in places that are not used."""
    logs: Tensor
    """[U, P] log t^ of the word of each place, all of its places together."""


def estimate(target: Drawn | TopDrawn, form: WordForm, number: int) -> Estimate:
    """Set ``number`` of packed draws [U, ...].

    Of ``drawN`` t^ = c / N * t / q for a word drawn c times (Anshumann et al. 2025, arXiv 2503.16870). Of ``topHdrawM`` t^ = t for the H
    words, and c / M of the others' mass for a word hit c times.
    """
    places = slice(form.top + number * form.draws, form.top + (number + 1) * form.draws)
    ids_UN = target.ids[:, places]
    if isinstance(target, Drawn):
        log_counts_UN = target.counts[:, places].clamp(min=1).log() - math.log(form.draws)
        log_t_UN = log_counts_UN + target.log_weights[:, places] if form.tau != 1 else log_counts_UN
        return Estimate(ids_UN, log_t_UN.exp() * target.counts[:, places].sign(), log_t_UN)
    hits_UN = (ids_UN[:, :, None] == ids_UN[:, None, :]).sum(-1)
    log_point_U1 = target.log_tail[:, None] - math.log(form.draws)
    ids_UP = torch.cat([target.ids[:, : form.top], ids_UN], -1)
    weights_UP = torch.cat([target.log_probs, log_point_U1.expand(ids_UN.shape)], -1).exp()
    return Estimate(ids_UP, weights_UP, torch.cat([target.log_probs, log_point_U1 + hits_UN.log()], -1))
