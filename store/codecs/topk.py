"""Codec ``topk``: the K likeliest words, their log-probabilities under the whole vocabulary, and the mass of all others.

In the forms ``topKpP`` (nuclei) units use as many of the K places as they need, the first ones; others have id 0 and UNUSED.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.codecs.ids import ids_array
from store.features import ArraySpec, FeatureKey, FeatureSpec, StoreDtype
from store.forms import WordForm, word_form

NO_TAIL = np.finfo(np.float32).min
"""Logarithm of the others' mass where there are no others."""

UNUSED = -32768.0
"""Log-probability of a place that holds no word: e to that power is 0, and every float type has the number, however few bits it keeps."""


def arrays(key: FeatureKey, dtype: StoreDtype, width: int, ids: Sequence[int]) -> tuple[ArraySpec, ...]:
    """``ids`` [K]; ``log_probs`` [K] in ``dtype``; ``log_tail`` [1] float32."""
    kept = form_of(key).top
    if kept > width:
        raise ValueError(f"{key}: expected at most the {width} words of the vocabulary, found {kept}")
    return (
        ids_array(kept, width),
        ArraySpec(name="log_probs", dtype=dtype, width=kept),
        ArraySpec(name="log_tail", dtype="float32", width=1),
    )


def reduce(
    logits_nV: NDArray[np.float32], spec: FeatureSpec, labels: NDArray[np.int64] | None, seeds: NDArray[np.uint64] | None
) -> dict[str, NDArray[Any]]:
    """Words by falling logit, equal ones by rising id; everything is computed in float64."""
    form = form_of(spec.feature)
    order = np.argsort(-logits_nV, axis=1, kind="stable")
    log_probs_nV = np.take_along_axis(logits_nV, order, 1).astype(np.float64)
    log_probs_nV -= log_sum_exp(log_probs_nV)
    before_nV = np.cumsum(np.exp(log_probs_nV), axis=1) - np.exp(log_probs_nV)
    places = np.arange(logits_nV.shape[1])
    kept_nV = (places < form.top) & ((before_nV < form.nucleus) | (places < form.least) | (form.nucleus == 1))
    with np.errstate(divide="ignore"):
        log_tail_n1 = np.maximum(log_sum_exp(np.where(kept_nV, -np.inf, log_probs_nV)), NO_TAIL)
    kept_nK, ids_nK, log_probs_nK = kept_nV[:, : form.top], order[:, : form.top], log_probs_nV[:, : form.top]
    return {"ids": np.where(kept_nK, ids_nK, 0), "log_probs": np.where(kept_nK, log_probs_nK, UNUSED), "log_tail": log_tail_n1}


def form_of(key: FeatureKey) -> WordForm:
    """The form of a key that has one, other than ``select``."""
    form = word_form(key.form)
    assert form is not None, key
    return form


def log_sum_exp(values_nV: NDArray[np.float64]) -> NDArray[Any]:
    """Over the last axis, which is kept."""
    highest = np.maximum(values_nV.max(-1, keepdims=True), np.finfo(np.float64).min)
    return highest + np.log(np.exp(values_nV - highest).sum(-1, keepdims=True))
