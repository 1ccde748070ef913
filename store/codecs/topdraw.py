"""Codec ``topdraw``: the H likeliest words with their probabilities, and M words drawn from the others.

With R the mass of the others, one random number u between 0 and 1 gives the points (u + j) / M * R, j = 0 .. M - 1, on the running sum of
their probabilities by rising id; each point is worth R / M to the word that it falls on (systematic sampling: Madow and Madow 1944, Annals
of Mathematical Statistics 15). So every word has on average the probability that the teacher gave it, likely ones without any variance,
all weights are known from R, and they always add up to 1. A word with more than R / M is hit each time. The construction is ours; that the
head is exact and only the rest drawn is what sets it apart from codec ``draw``.

Shapes: n units, V words, H head words, D sets of draws, M points of a set, P = D * M.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.codecs.draw import chosen
from store.codecs.ids import ids_array
from store.codecs.topk import UNUSED, form_of, log_sum_exp
from store.features import ArraySpec, FeatureKey, FeatureSpec, StoreDtype
from store.seeds import uniforms


def arrays(key: FeatureKey, dtype: StoreDtype, width: int, ids: Sequence[int]) -> tuple[ArraySpec, ...]:
    """``ids`` [H + P], ``log_probs`` [H] and ``log_tail`` [1], log R, in ``dtype``.

    An R rounded to float16 is off by 0.02 % of all mass at most, which is no more than the head's probabilities are.
    """
    form = form_of(key)
    form.check(width)
    return (
        ids_array(form.top + form.drawn, width),
        ArraySpec(name="log_probs", dtype=dtype, width=form.top),
        ArraySpec(name="log_tail", dtype=dtype, width=1),
    )


def reduce(
    logits_nV: NDArray[np.float32], spec: FeatureSpec, labels: NDArray[np.int64] | None, seeds: NDArray[np.uint64] | None
) -> dict[str, NDArray[Any]]:
    """The head by falling logit, equal ones by rising id; then each set's words by rising id, as often as they were hit."""
    assert seeds is not None, "words are drawn by seeds"
    form = form_of(spec.feature)
    head_nH = np.argsort(-logits_nV, axis=1, kind="stable")[:, : form.top]
    log_probs_nV = logits_nV - log_sum_exp(logits_nV.astype(np.float64))
    others_nV = log_probs_nV.copy()
    np.put_along_axis(others_nV, head_nH, -np.inf, 1)
    points_nP = points(uniforms(seeds, form.samples), form.draws).reshape(len(logits_nV), form.drawn)
    with np.errstate(divide="ignore"):
        log_tail_n1 = np.maximum(log_sum_exp(others_nV), UNUSED)
    ids = np.concatenate([head_nH, chosen(others_nV, points_nP)], axis=1)
    return {"ids": ids, "log_probs": np.take_along_axis(log_probs_nV, head_nH, 1), "log_tail": log_tail_n1}


def points(starts_nD: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """[n, D, M] where M = ``count`` evenly spaced points lie in the others' mass."""
    return (starts_nD[..., None] + np.arange(count)) / count
