"""Codec ``cast``: the captured values themselves, as float32 (exact), float16 or bfloat16, with all or fewer mantissa bits."""

from collections.abc import Sequence
from typing import Any

import numcodecs
import numpy as np
from numpy.typing import NDArray

from store.codecs import float8
from store.codecs.ids import pack, unpack
from store.features import MANTISSA, ArraySpec, Dtype, FeatureKey, FeatureSpec, StoreDtype

DTYPE_ERROR: dict[str, float] = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Bound of the relative rounding error of normal numbers: half a unit in the last place."""


def arrays(key: FeatureKey, dtype: StoreDtype, width: int, ids: Sequence[int]) -> tuple[ArraySpec, ...]:
    """One nameless array as wide as what was captured."""
    assert dtype in MANTISSA
    return (ArraySpec(name="", dtype=dtype, width=width),)


def reduce(
    values_nW: NDArray[np.float32], spec: FeatureSpec, labels: NDArray[np.int64] | None, seeds: NDArray[np.uint64] | None
) -> dict[str, NDArray[Any]]:
    """All of it."""
    return {"": values_nW}


def bounds(array: ArraySpec) -> tuple[float, float]:
    """Bounds of the error relative to the element, for normal numbers, and to the largest one of its unit.

    Half a unit of the last bit that is kept, which is at most 2**-(bits + 1) of a number. Storing rounded numbers in a
    type of no fewer bits costs nothing more.
    """
    return (DTYPE_ERROR[array.dtype] if array.keep_bits is None else 2.0 ** -(array.keep_bits + 1)), 0.0


def stored(values: NDArray[Any], array: ArraySpec) -> NDArray[Any]:
    """``values`` as ``array`` holds them."""
    if array.bits is not None:
        return pack(values.reshape(-1, array.numbers), array.bits)
    return round_to(values if array.keep_bits is None else round_bits(values, array.keep_bits), array.dtype)


def round_bits(values: NDArray[Any], keep_bits: int) -> NDArray[np.float32]:
    """``values`` with so many mantissa bits, to nearest even; what passes the largest float32 becomes infinite."""
    values = values.astype(np.float32, copy=False)
    rounded = numcodecs.BitRound(keep_bits).encode(np.ascontiguousarray(values)).view(np.float32)
    return np.where(np.isnan(values), values, rounded)  # adding to a NaN's bits could carry it into a number


def round_to(values: NDArray[Any], dtype: Dtype) -> NDArray[Any]:
    """``values`` in a stored type, to nearest even; bfloat16 and float8 as their bits, what is too large for float16 as infinity.

    What goes to int8 and float8 lies within their range already.
    """
    if dtype == "bfloat16":
        return _bfloat16(values.astype(np.float32, copy=False))
    if dtype == "float8_e4m3fn":
        return float8.codes(values.astype(np.float32, copy=False))
    with np.errstate(over="ignore", invalid="ignore"):  # a NaN as int8: its unit's scale is NaN too
        return values.astype(dtype, copy=False)


def restored(held: NDArray[Any], array: ArraySpec) -> NDArray[Any]:
    """What ``array`` holds as float32, ids as int64."""
    return restore(held, array.dtype) if array.bits is None else unpack(held.reshape(-1, array.width), array.bits)


def restore(stored: NDArray[Any], dtype: Dtype) -> NDArray[Any]:
    """Stored values as float32, whole numbers as int64."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "float8_e4m3fn":
        return float8.VALUES[stored]
    return stored.astype(np.float32 if dtype in ("float32", "float16", "int8") else np.int64)


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(values).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    # Adding to a NaN's bits could carry it into an infinity or a number.
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
