"""Codec ``cast``: the captured values themselves, as float32 (exact), float16 or bfloat16."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.features import ArraySpec, Dtype, FeatureKey, FeatureSpec

DTYPE_ERROR: dict[str, float] = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Bound of the relative rounding error of normal numbers: half a unit in the last place."""


def arrays(key: FeatureKey, dtype: Dtype, width: int, ids: Sequence[int]) -> tuple[ArraySpec, ...]:
    """One nameless array as wide as what was captured."""
    return (ArraySpec(name="", dtype=dtype, width=width),)


def reduce(values_nW: NDArray[np.float32], spec: FeatureSpec, labels: NDArray[np.int64] | None) -> dict[str, NDArray[Any]]:
    """All of it."""
    return {"": values_nW}


def round_to(values: NDArray[Any], dtype: Dtype) -> NDArray[Any]:
    """``values`` in a stored type, to nearest even; bfloat16 as uint16, what is too large for float16 as infinity."""
    if dtype == "bfloat16":
        return _bfloat16(values.astype(np.float32, copy=False))
    with np.errstate(over="ignore"):
        return values.astype(dtype, copy=False)


def restore(stored: NDArray[Any], dtype: Dtype) -> NDArray[Any]:
    """Stored values as float32, ids as int64."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32 if dtype in ("float32", "float16") else np.int64)


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(values).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    # Adding to a NaN's bits could carry it into an infinity or a number.
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
