"""Codec ``int8``: whole numbers from -127 to 127, and what one of them is worth in each unit.

With m the largest magnitude of a unit, the scale is m / 127 rounded to float32, and a number x is kept as x / scale
rounded to nearest even. Half a step is m / 254; the roundings of scale, quotient and product add less than m / 2**22
(less than m / 2**17 in the scale alone where it is a denormal number), so that 1 / 253 bounds all of it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.features import ArraySpec, FeatureKey, FeatureSpec, StoreDtype

LIMIT = 127.0
"""Largest whole number that is used; -128 is not."""

BOUNDS = (0.0, 1 / 253)
"""Bounds of the error relative to the element, and to the largest magnitude of its unit, where that is a normal number."""

OVERFLOW = np.finfo(np.float32).max / np.float32(LIMIT)
"""The one scale whose 127-fold is infinite; the next smaller one takes its place."""
BELOW_OVERFLOW = np.nextafter(OVERFLOW, np.float32(0))


def arrays(key: FeatureKey, dtype: StoreDtype, width: int, ids: Sequence[int]) -> tuple[ArraySpec, ...]:
    """``values`` as wide as what was captured, and ``scale`` [1] float32."""
    return ArraySpec(name="values", dtype="int8", width=width), ArraySpec(name="scale", dtype="float32", width=1)


def reduce(
    values_nW: NDArray[np.float32], spec: FeatureSpec, labels: NDArray[np.int64] | None, seeds: NDArray[np.uint64] | None
) -> dict[str, NDArray[Any]]:
    """Whole numbers, still as float32, and scales. A unit of zeros has scale 0; one with a NaN or an infinity reads as NaN."""
    scale_n1 = np.abs(values_nW).max(1, keepdims=True) / np.float32(LIMIT)
    scale_n1[scale_n1 == OVERFLOW] = BELOW_OVERFLOW
    return {"values": np.rint(quotients(values_nW, scale_n1, LIMIT)), "scale": scale_n1}


def expand(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Values times scale; NaN where nothing was stored, because the scale is."""
    with np.errstate(invalid="ignore"):  # zero times the infinite scale of a unit that held an infinity
        return {"": arrays["values"] * arrays["scale"]}


def quotients(values_nW: NDArray[np.float32], scale_n1: NDArray[np.float32], limit: float) -> NDArray[np.float32]:
    """``values_nW`` in units of their scale, at most ``limit``: a denormal scale may be rounded down so far that they pass it."""
    with np.errstate(invalid="ignore"):
        return np.clip(values_nW / np.where(scale_n1 > 0, scale_n1, np.float32(1)), -np.float32(limit), np.float32(limit))
