"""A stored feature kept in another way: another type, fewer bits, compressed, or for fewer tokens of a row.

Shapes: n rows, T tokens of all of them, U units of a feature, W width.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.codecs import cast, decode, encode, feature_spec
from store.features import MANTISSA, Compression, FeatureKey, FeatureSpec, StoreDtype
from store.reader import Arrays, Store
from store.table import Ints, Numbers

POSITIONS = ("first", "last", "mean", "masked", "labels")
"""What values for all tokens can be reduced to."""

BYTES = 16 << 20
"""Stored values that are decoded in one go, unless those of one row are more."""


@dataclass(frozen=True)
class Keeping:
    """How features are kept; what is not said stays as it is."""

    dtype: StoreDtype | None = None
    """Of features that are kept whole; forms such as ``top64`` take float types only and keep theirs otherwise."""
    keep_bits: int | None = None
    compression: Compression | None = None
    positions: str | None = None
    """Tokens to which features with values for all tokens are reduced."""

    def spec(self, old: FeatureSpec, vocabulary: int) -> FeatureSpec:
        """How a feature is kept from now on; ``old`` itself where nothing changes.

        The declared errors are those of both roundings together.

        Raises:
            ValueError: the feature cannot be kept so.
        """
        key = self.key(old.feature)
        numbers = old.numbers
        counted = numbers.name == "counts"  # whole numbers, which are kept as they are
        stored: StoreDtype = old.codec if old.codec in ("int8", "float8") else "float32" if counted else numbers.dtype  # type: ignore[assignment]
        dtype = self.dtype if self.dtype is not None and (not key.words or self.dtype in MANTISSA) else stored
        bits = self.keep_bits if self.keep_bits is not None else numbers.keep_bits if dtype == stored else None
        compression = self.compression if self.compression is not None else "zstd" if old.compressed else "none"
        new = feature_spec(key, dtype, vocabulary if key.words else numbers.width, old.ids, bits, compression)
        if same_numbers(old, new) and key.positions != "mean":
            return new.model_copy(update={"error": old.error, "error_of_largest": old.error_of_largest})
        error = old.error + new.error * (1 + old.error)
        of_largest = old.error_of_largest * (1 + new.error) + new.error_of_largest * (1 + old.error + old.error_of_largest)
        return new.model_copy(update={"error": error, "error_of_largest": of_largest})

    def key(self, key: FeatureKey) -> FeatureKey:
        """The name of a feature after reduction.

        Raises:
            ValueError: it has no such values.
        """
        if self.positions is None or key.positions != "all":
            return key
        if self.positions == "mean" and key.words:
            raise ValueError(f"{key}: word predictions have no mean; expected positions {', '.join(POSITIONS[:2])} or labels")
        return key.at(self.positions)


def same_numbers(old: FeatureSpec, new: FeatureSpec) -> bool:
    """Whether two specs hold the same bits, compressed or not, but for how ids lie."""

    def held(spec: FeatureSpec) -> tuple[object, ...]:
        numbers = [(array.name, array.dtype, array.width, array.keep_bits) for array in spec.arrays if array.name != "ids"]
        return spec.codec, spec.ids, numbers

    return held(old) == held(new)


def recoded(store: Store, pass_name: str, old: FeatureSpec, new: FeatureSpec, rows: Ints) -> Arrays:
    """The arrays of ``old`` for ``rows`` of a store as those of ``new``, packed [U, W].

    Raises:
        ValueError: a number is too large for the new type.
    """
    found = [_recoded(store, pass_name, old, new, some) for some in cut(store, rows, old)]
    return {name: np.concatenate([arrays[name] for arrays in found]) for name in found[0]}


def cut(store: Store, rows: Ints, spec: FeatureSpec) -> list[Ints]:
    """``rows`` in pieces whose values of a feature fit in little memory."""
    units = store.rows.at(rows).units(spec.feature.positions)[1]
    return np.split(rows, np.flatnonzero(np.diff(np.cumsum(units * spec.unit_bytes) // BYTES)) + 1)


def _recoded(store: Store, pass_name: str, old: FeatureSpec, new: FeatureSpec, rows: Ints) -> Arrays:
    arrays = store.read(old.feature.of(pass_name), rows)
    mean = new.feature.positions == "mean" != old.feature.positions
    if new.feature.positions != old.feature.positions and not mean:
        units = places(store, rows, new.feature.positions)
        arrays = {name: values_UW[units] for name, values_UW in arrays.items()}
    lie_alike = [(array.dtype, array.bits) for array in old.arrays] == [(array.dtype, array.bits) for array in new.arrays]
    if same_numbers(old, new) and lie_alike and not mean:
        return arrays
    values = decode(old, arrays)
    if mean:
        values = {"": _means(values[""], store.rows.at(rows))}
    as_forms = {array.name: cast.stored(values[array.name], array) for array in new.arrays if new.feature.words}
    found = as_forms or encode(new, values[""])
    _check_finite(new, values, found)
    return found


def places(store: Store, rows: Ints, positions: str) -> Ints:
    """Where in the packed tokens of ``rows`` the units of ``positions`` (first, last, masked or labels) are, ascending."""
    numbers = store.rows.at(rows)
    first = np.cumsum(numbers.length) - numbers.length
    if positions == "first":
        return first
    if positions == "last":
        return first + numbers.length - 1
    if any(array.name == "token_labels" for array in store.manifest.rows.token_arrays):
        labelled_T = store.tokens("token_labels", rows) >= 0
    elif store.manifest.rows.objective == "causal":
        labelled_T = _followed(store, rows, first)
    else:
        labelled_T = np.zeros(int(numbers.length.sum()), np.bool_)
    found = np.flatnonzero(labelled_T)
    if len(found) != numbers.labelled.sum():
        raise ValueError(f"{store.path}: expected {numbers.labelled.sum()} labelled tokens in these rows, found {len(found)}")
    return found


def _followed(store: Store, rows: Ints, first: Ints) -> NDArray[np.bool_]:
    """[T] which tokens are followed by another one of their document, which is their label."""
    tokens = int(store.rows.at(rows).length.sum())
    begins_T = np.zeros(tokens + 1, np.bool_)
    begins_T[first] = begins_T[-1] = True
    if any(array.name == "documents" for array in store.manifest.rows.token_arrays):
        documents_T = store.tokens("documents", rows)
        begins_T[1:-1] |= documents_T[1:] != documents_T[:-1]
    return ~begins_T[1:]


def _means(values_TW: NDArray[Any], numbers: Numbers) -> NDArray[np.float32]:
    """[n, W] mean over the tokens of each row, summed in float64."""
    first = np.cumsum(numbers.length) - numbers.length
    sums_nW = np.add.reduceat(values_TW.astype(np.float64), first)
    return (sums_nW / numbers.length[:, None]).astype(np.float32)


def _check_finite(spec: FeatureSpec, values: Arrays, found: Arrays) -> None:
    """Refuse numbers that were finite and are so no more."""
    for name, restored in decode(spec, found).items():
        if (np.isfinite(values[name]) & ~np.isfinite(restored)).any():
            lost = values[name][np.isfinite(values[name]) & ~np.isfinite(restored)]
            raise ValueError(
                f"{spec.key}: {lost[0]:g} cannot be kept in {spec.kept_as}: it is too large, or beside one that is not finite; "
                "expected bfloat16 or float32"
            )
