"""How a captured feature becomes stored arrays and comes back: the NumPy half of each codec.

Shapes: n units (tokens or rows), W width of what was captured (V words for word logits), K kept words.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from store.codecs import cast, draw, float8, int8, select, topband, topdraw, topk
from store.codecs.cast import restore as restore
from store.codecs.cast import round_to as round_to
from store.features import MANTISSA, ArraySpec, Compression, FeatureKey, FeatureSpec, StoreDtype
from store.forms import word_form

Floats = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]


def _as_they_are(arrays: Arrays) -> Arrays:
    return arrays


class Codec(NamedTuple):
    """A form that features are kept in."""

    arrays: Callable[[FeatureKey, StoreDtype, int, Sequence[int]], tuple[ArraySpec, ...]]
    """Arrays of a key whose captured width is W, with numbers in the given type and the ids that ``select`` keeps."""
    reduce: Callable[[Floats, FeatureSpec, NDArray[np.int64] | None, NDArray[np.uint64] | None], Arrays]
    """What is kept of captured float32 [n, W], not yet in its stored type; labels [n] (or None) hold -100 where there is none, seeds [n]
    (store.seeds) say which words are drawn."""
    bounds: Callable[[ArraySpec], tuple[float, float]] = cast.bounds
    """``error`` and ``error_of_largest`` (store.features.FeatureSpec) of numbers that are kept in the given array."""
    expand: Callable[[Arrays], Arrays] = _as_they_are
    """What arrays of float32 (ids int64) stand for: what was captured, where all of it was kept."""


CODECS: dict[str, Codec] = {
    "cast": Codec(cast.arrays, cast.reduce),
    "topk": Codec(topk.arrays, topk.reduce),
    "draw": Codec(draw.arrays, draw.reduce, draw.bounds),
    "topdraw": Codec(topdraw.arrays, topdraw.reduce),
    "topband": Codec(topband.arrays, topband.reduce),
    "select": Codec(select.arrays, select.reduce),
    "int8": Codec(int8.arrays, int8.reduce, lambda array: int8.BOUNDS, int8.expand),
    "float8": Codec(float8.arrays, float8.reduce, lambda array: float8.BOUNDS, float8.expand),
}


def codec_of(key: FeatureKey, dtype: StoreDtype) -> str:
    """Name of the codec that keeps ``key`` in ``dtype``.

    Raises:
        ValueError: the key's form is kept in float types only.
    """
    if not key.words:
        return "cast" if dtype in MANTISSA else dtype
    if dtype not in MANTISSA:
        raise ValueError(
            f"{key.of('')}: expected dtype {', '.join(MANTISSA)} for the form {key.form}, found {dtype}; give it one of its own"
        )
    form = word_form(key.form)
    return "select" if form is None else form.codec


def feature_spec(
    key: FeatureKey,
    dtype: StoreDtype,
    width: int,
    ids: Sequence[int] = (),
    keep_bits: int | None = None,
    compression: Compression = "none",
) -> FeatureSpec:
    """How ``key`` (its pass is left out) is stored, when ``width`` values are captured for each unit.

    Args:
        ids: Vocabulary ids that the form ``select`` keeps.
        keep_bits: Mantissa bits of the numbers that are stored in ``dtype``; all by default.
        compression: Of all arrays that hold more than one number for each unit.

    Raises:
        ValueError: more words or bits are asked for than there are, or the form has no such dtype.
    """
    codec = CODECS[codec_of(key, dtype)]
    keep_bits = check_bits(dtype, keep_bits)
    arrays = tuple(
        array.model_copy(
            update={
                "keep_bits": keep_bits if array.name in _NUMBERS else None,
                "compression": compression if array.width > 1 else "none",
            }
        )
        for array in codec.arrays(key, dtype, width, ids)
    )
    spec = FeatureSpec(key=str(key.of("")), codec=codec_of(key, dtype), arrays=arrays, ids=tuple(ids), error=0.0)
    error, error_of_largest = codec.bounds(spec.numbers)
    return spec.model_copy(update={"error": error, "error_of_largest": error_of_largest})


_NUMBERS = ("", "log_probs", "log_weights", "logits")
"""Arrays whose bits ``keep_bits`` is about."""


def check_bits(dtype: StoreDtype, keep_bits: int | None) -> int | None:
    """``keep_bits`` if they are fewer than ``dtype`` has, None if they are all; raises ValueError if it has not so many."""
    if keep_bits is None:
        return None
    if dtype not in MANTISSA:
        raise ValueError(f"keep_bits: {dtype} has no mantissa to be rounded; expected it with {', '.join(MANTISSA)}")
    if not 1 <= keep_bits <= MANTISSA[dtype]:
        raise ValueError(f"keep_bits: expected 1 to {MANTISSA[dtype]}, all that {dtype} has, found {keep_bits}")
    return None if keep_bits == MANTISSA[dtype] else keep_bits


def encode(spec: FeatureSpec, values: Floats, labels: NDArray[np.int64] | None = None, seeds: NDArray[np.uint64] | None = None) -> Arrays:
    """Captured float32 [n, W] as the arrays that ``StoreWriter.commit`` takes; forms that draw words need ``seeds`` [n]."""
    kept = CODECS[spec.codec].reduce(values, spec, labels, seeds)
    return {array.name: cast.stored(kept[array.name], array) for array in spec.arrays}


def decode(spec: FeatureSpec, arrays: Arrays) -> Arrays:
    """Stored arrays [n, width] as float32 (ids as int64), by array name; all of a value is the array ``""``."""
    return CODECS[spec.codec].expand({array.name: cast.restored(arrays[array.name], array) for array in spec.arrays})
