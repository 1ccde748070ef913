"""Codec ``float8``: e4m3fn numbers (4 bits of exponent, 3 of mantissa, no infinities), and a scale for each unit.

With m the largest magnitude of a unit, the scale is m / 448 rounded to float32, and x is kept as x / scale rounded to
nearest even, so that the unit uses all of the format's range. From m / 28672 on (2**-6 of the format, its smallest normal number)
rounding costs at most x / 17, which with the roundings of scale, quotient and product stays below x / 16; below, where
steps are even (denormal numbers), half a step is 2**-10 of the format, m / 458752.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.codecs.int8 import expand as expand
from store.codecs.int8 import quotients
from store.features import ArraySpec, FeatureKey, FeatureSpec, StoreDtype

LIMIT = 448.0
"""The format's largest number."""

BOUNDS = (2.0**-4, 2.0**-10 / LIMIT)
"""Bounds of the error relative to the element, and to the largest magnitude of its unit, where that is a normal number."""

_CODES = np.arange(256)
_EXPONENT, _MANTISSA = (_CODES >> 3) & 15, _CODES & 7
_MAGNITUDES = np.where(_EXPONENT == 0, _MANTISSA * 2.0**-9, (1 + _MANTISSA / 8) * 2.0 ** (_EXPONENT - 7.0))
_MAGNITUDES[_CODES & 127 == 127] = np.nan
VALUES = np.where(_CODES < 128, _MAGNITUDES, -_MAGNITUDES).astype(np.float32)
"""[256] what each code stands for."""


def arrays(key: FeatureKey, dtype: StoreDtype, width: int, ids: Sequence[int]) -> tuple[ArraySpec, ...]:
    """``values`` as wide as what was captured, and ``scale`` [1] float32."""
    return ArraySpec(name="values", dtype="float8_e4m3fn", width=width), ArraySpec(name="scale", dtype="float32", width=1)


def reduce(
    values_nW: NDArray[np.float32], spec: FeatureSpec, labels: NDArray[np.int64] | None, seeds: NDArray[np.uint64] | None
) -> dict[str, NDArray[Any]]:
    """Numbers within the format's range, still as float32, and scales. A unit of zeros has scale 0."""
    scale_n1 = np.abs(values_nW).max(1, keepdims=True) / np.float32(LIMIT)
    return {"values": quotients(values_nW, scale_n1, LIMIT), "scale": scale_n1}


def codes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The codes of float32 ``values`` within ±448, to nearest even; NaN is 0x7F."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    # Twenty mantissa bits go; carries move on into the exponent, whose bias falls from 127 to 7.
    normal = ((magnitude + np.uint32(0x7FFFF) + ((magnitude >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)) - np.uint32(120 << 3)
    # Beside 2**14 the last bit of a float32 is worth 2**-9, a step of the denormal numbers.
    steps = (np.abs(values) + np.float32(2**14)).view(np.uint32) - np.float32(2**14).view(np.uint32)
    code = np.where(magnitude < np.float32(2**-6).view(np.uint32), steps, normal) | ((bits >> np.uint32(24)) & np.uint32(0x80))
    return np.where(np.isnan(values), np.uint32(0x7F), code).astype(np.uint8)
