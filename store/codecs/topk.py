"""Codec ``topk``: the K likeliest words, their log-probabilities under the whole vocabulary, and the mass of all others."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.features import ArraySpec, FeatureKey, FeatureSpec, StoreDtype

NO_TAIL = np.finfo(np.float32).min
"""Logarithm of the others' mass where there are no others."""


def arrays(key: FeatureKey, dtype: StoreDtype, width: int, ids: Sequence[int]) -> tuple[ArraySpec, ...]:
    """``ids`` [K], uint16 where the vocabulary allows; ``log_probs`` [K] in ``dtype``; ``log_tail`` [1] float32."""
    kept = int(key.form.removeprefix("top"))
    if kept > width:
        raise ValueError(f"{key}: expected at most the {width} words of the vocabulary, found {kept}")
    return (
        ArraySpec(name="ids", dtype="uint16" if width <= 1 << 16 else "int32", width=kept),
        ArraySpec(name="log_probs", dtype=dtype, width=kept),
        ArraySpec(name="log_tail", dtype="float32", width=1),
    )


def reduce(logits_nV: NDArray[np.float32], spec: FeatureSpec, labels: NDArray[np.int64] | None) -> dict[str, NDArray[Any]]:
    """Words by falling logit, equal ones by rising id; everything is computed in float64."""
    kept = spec.arrays[0].width
    order = np.argsort(-logits_nV, axis=1, kind="stable")
    sorted_nV = np.take_along_axis(logits_nV, order, 1).astype(np.float64)
    log_sum = log_sum_exp(sorted_nV)
    others = sorted_nV[:, kept:]
    log_tail = log_sum_exp(others) - log_sum if others.shape[1] else np.full_like(log_sum, NO_TAIL)
    return {"ids": order[:, :kept], "log_probs": sorted_nV[:, :kept] - log_sum, "log_tail": np.maximum(log_tail, NO_TAIL)}


def log_sum_exp(values_nV: NDArray[np.float64]) -> NDArray[Any]:
    """Over the last axis, which is kept."""
    highest = values_nV.max(-1, keepdims=True)
    return highest + np.log(np.exp(values_nV - highest).sum(-1, keepdims=True))
