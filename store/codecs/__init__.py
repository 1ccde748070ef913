"""How a captured feature becomes stored arrays and comes back: the NumPy half of each codec.

Shapes: n units (tokens or rows), W width of what was captured (V words for word logits), K kept words.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from store.codecs import cast, select, topk
from store.codecs.cast import DTYPE_ERROR, restore, round_to
from store.features import ArraySpec, Dtype, FeatureKey, FeatureSpec

Floats = NDArray[np.float32]


class Codec(NamedTuple):
    """A form that features are kept in."""

    arrays: Callable[[FeatureKey, Dtype, int, Sequence[int]], tuple[ArraySpec, ...]]
    """Arrays of a key whose captured width is W, with numbers in the given type and the ids that ``select`` keeps."""
    reduce: Callable[[Floats, FeatureSpec, NDArray[np.int64] | None], dict[str, NDArray[Any]]]
    """What is kept of captured float32 [n, W], not yet in its stored type; labels [n] (or None) hold -100 where there is none."""


CODECS: dict[str, Codec] = {
    "cast": Codec(cast.arrays, cast.reduce),
    "topk": Codec(topk.arrays, topk.reduce),
    "select": Codec(select.arrays, select.reduce),
}


def codec_of(key: FeatureKey) -> str:
    """Name of the codec that stores ``key``, by its form."""
    return "topk" if key.form.startswith("top") else key.form or "cast"


def feature_spec(key: FeatureKey, dtype: Dtype, width: int, ids: Sequence[int] = ()) -> FeatureSpec:
    """How ``key`` (its pass is left out) is stored, when ``width`` values are captured for each unit.

    ``ids`` are the vocabulary ids that the form ``select`` keeps.

    Raises:
        ValueError: more words are asked for than there are.
    """
    codec = codec_of(key)
    arrays = CODECS[codec].arrays(key, dtype, width, ids)
    return FeatureSpec(key=str(key.of("")), codec=codec, arrays=arrays, ids=tuple(ids), error=DTYPE_ERROR[dtype])


def encode(spec: FeatureSpec, values: Floats, labels: NDArray[np.int64] | None = None) -> dict[str, NDArray[Any]]:
    """Captured float32 [n, W] as the arrays that ``StoreWriter.commit`` takes."""
    kept = CODECS[spec.codec].reduce(values, spec, labels)
    return {array.name: round_to(kept[array.name], array.dtype) for array in spec.arrays}


def decode(spec: FeatureSpec, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Stored arrays [n, width] as float32 (ids as int64), by array name."""
    return {array.name: restore(arrays[array.name], array.dtype) for array in spec.arrays}
