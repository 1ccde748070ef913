"""Codec ``select``: the logits of chosen words and of the position's label, and the exact log-sum-exp over all words."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.codecs.topk import log_sum_exp
from store.features import ArraySpec, FeatureKey, FeatureSpec, StoreDtype


def arrays(key: FeatureKey, dtype: StoreDtype, width: int, ids: Sequence[int]) -> tuple[ArraySpec, ...]:
    """``logits`` of the chosen words in ``dtype``, if any were chosen; ``true_logit`` and ``log_sum_exp`` [1] float32."""
    if wrong := [word for word in ids if not 0 <= word < width]:
        raise ValueError(f"{key}: expected word ids 0 to {width - 1}, found {wrong}")
    chosen = (ArraySpec(name="logits", dtype=dtype, width=len(ids)),) if ids else ()
    return (*chosen, ArraySpec(name="true_logit", dtype="float32", width=1), ArraySpec(name="log_sum_exp", dtype="float32", width=1))


def reduce(
    logits_nV: NDArray[np.float32], spec: FeatureSpec, labels: NDArray[np.int64] | None, seeds: NDArray[np.uint64] | None
) -> dict[str, NDArray[Any]]:
    """The true logit is NaN at positions without a label."""
    true = np.full((len(logits_nV), 1), np.nan, np.float32)
    if labels is not None:
        has = np.flatnonzero(labels >= 0)
        true[has, 0] = logits_nV[has, labels[has]]
    kept: dict[str, NDArray[Any]] = {"true_logit": true, "log_sum_exp": log_sum_exp(logits_nV.astype(np.float64))}
    return {"logits": logits_nV[:, list(spec.ids)], **kept} if spec.ids else kept
