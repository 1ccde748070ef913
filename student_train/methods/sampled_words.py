"""Learning from words that were drawn at random from a teacher's predictions, beside its likeliest ones or alone.

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


def estimated_kl(logits_UV: Tensor, target: Estimate) -> Tensor:
    """[U] sum over words of t^ (log t^ - log q), q the student's softmax over all words.

    Its gradient in the logits, q sum(t^) - t^, is on average that of KL(t || q). Its value is above that on average, by what drawing takes
    from t's entropy, which no student changes.
    """
    log_q_UP = logits_UV.gather(-1, target.ids) - logits_UV.logsumexp(-1, keepdim=True)
    return (target.weights * (target.logs - log_q_UP)).sum(-1)


def chosen_form(
    words: int, top: int | None, nucleus: float | None, least: int | None, draws: int | None, tau: float | None, samples: int | None
) -> WordForm | None:
    """The form that ``lm_kd``'s options name, of a vocabulary of so many words; None for dense logits.

    Raises:
        ValueError: they contradict each other; says which serve.
    """
    if top is None and draws is None:
        for option, value in {"nucleus": nucleus, "least": least, "tau": tau, "samples": samples}.items():
            if value is not None:
                needed = "top (words at most)" if option in ("nucleus", "least") else "draws (words of a set)"
                raise ValueError(f"{option}: goes with {needed}; set it, or leave {option} out (dense logits)")
        return None
    if draws is None and (tau is not None or samples is not None):
        raise ValueError("tau, samples: go with draws, words drawn at random; set it, or leave both out (the likeliest words)")
    if draws is not None and nucleus is not None:
        raise ValueError("nucleus: goes with top alone; with draws the mass of the others is drawn from, whatever it is; leave one out")
    if least is not None and nucleus is None:
        raise ValueError("least: says how many words a nucleus has at least; set nucleus, or leave it out")
    form = WordForm(top or 0, 1.0 if nucleus is None else nucleus, least or 1, draws or 0, 1.0 if tau is None else tau, samples or 1)
    form.check(words)
    return form
