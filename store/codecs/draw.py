"""Codec ``draw``: words drawn at random from a prediction, and how often each was (RS-KD).

N draws with replacement from q, the tau-th power of the prediction t made a distribution again; a word drawn c times counts as
c / N * t / q. That is an unbiased estimate of t in every word, so that cross entropy against it has, on average, the gradient of the whole
prediction. With tau = 1 its weights add up to 1; other powers trade the likely words' variance against that of the others.

Anshumann et al. 2025, "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", ACL 2025, arXiv 2503.16870.

Masses are whole numbers in units of 2**-38 of the likeliest word's: their running sum is exact and depends on no order of summation, and a
word without mass is never drawn. What is lost of a word is less than such a unit, and the rounding of its mass (on devices to float32).

Shapes: n units, V words, D sets of draws, N draws of a set, P = D * N places.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.codecs import cast
from store.codecs.ids import ids_array
from store.codecs.topk import form_of, log_sum_exp
from store.features import ArraySpec, FeatureKey, FeatureSpec, StoreDtype
from store.seeds import uniforms

MASS = 2.0**38
"""Of the likeliest word, as a whole number: those of 2**24 words add up to less than 2**63."""


def arrays(key: FeatureKey, dtype: StoreDtype, width: int, ids: Sequence[int]) -> tuple[ArraySpec, ...]:
    """``ids`` [P] and ``counts`` [P]; with a power ``log_weights`` [P], log(t / q), in ``dtype``."""
    form = form_of(key)
    weights = (ArraySpec(name="log_weights", dtype=dtype, width=form.drawn),) if form.tau != 1 else ()
    return (
        ids_array(form.drawn, width),
        ArraySpec(name="counts", dtype="uint8" if form.draws <= 255 else "uint16", width=form.drawn),
        *weights,
    )


def bounds(array: ArraySpec) -> tuple[float, float]:
    """Counts are exact; weights are as their type is."""
    return cast.bounds(array) if array.name == "log_weights" else (0.0, 0.0)


def reduce(
    logits_nV: NDArray[np.float32], spec: FeatureSpec, labels: NDArray[np.int64] | None, seeds: NDArray[np.uint64] | None
) -> dict[str, NDArray[Any]]:
    """In each set the words by rising id in its first places, each once; further places have id and count 0."""
    assert seeds is not None, "words are drawn by seeds"
    form = form_of(spec.feature)
    scaled_nV = logits_nV.astype(np.float64) * form.tau
    drawn_nP = chosen(scaled_nV, uniforms(seeds, form.drawn))
    ids_nDN, counts_nDN = (np.zeros((len(logits_nV), form.samples, form.draws), np.int64) for _ in range(2))
    for unit, sets_DN in enumerate(drawn_nP.reshape(ids_nDN.shape)):
        for number, set_N in enumerate(sets_DN):
            words, counts = np.unique(set_N, return_counts=True)
            ids_nDN[unit, number, : len(words)], counts_nDN[unit, number, : len(words)] = words, counts
    ids_nP, counts_nP = ids_nDN.reshape(drawn_nP.shape), counts_nDN.reshape(drawn_nP.shape)
    log_t_nV = logits_nV - log_sum_exp(logits_nV.astype(np.float64))
    log_weights_nP = np.take_along_axis(log_t_nV - (scaled_nV - log_sum_exp(scaled_nV)), ids_nP, 1)
    return {"ids": ids_nP, "counts": counts_nP, "log_weights": np.where(counts_nP > 0, log_weights_nP, 0)}


def chosen(scores_nV: NDArray[np.float64], points_nP: NDArray[np.float64]) -> NDArray[np.int64]:
    """[n, P] the words at ``points_nP``, between 0 and 1, of the running sum of softmax(scores)."""
    highest_n1 = np.maximum(scores_nV.max(1, keepdims=True), np.finfo(np.float64).min)
    running_nV = np.cumsum((np.exp(scores_nV - highest_n1) * MASS).astype(np.int64), axis=1)
    at_nP = np.minimum((points_nP * running_nV[:, -1:]).astype(np.int64), running_nV[:, -1:] - 1)
    found = [np.searchsorted(running_V, at_P, side="right") for running_V, at_P in zip(running_nV, at_nP, strict=True)]
    return np.array(found, np.int64).reshape(points_nP.shape)
