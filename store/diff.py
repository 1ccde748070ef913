"""Two stores compared: the same rows, and how far apart what is stored of them is.

Shapes: n rows, T tokens of all of them, U units of a feature, W width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.codecs import decode
from store.errors import MissingFeature
from store.features import FeatureSpec
from store.reader import Store
from store.recode import cut
from store.strict import did_you_mean
from store.table import Ints


@dataclass
class Apart:
    """How far numbers of one array are apart."""

    values: int = 0
    differing: int = 0
    """Numbers that are not the same, bit for bit once decoded (all NaN are)."""
    largest: float = 0.0
    """Largest absolute difference."""
    relative: float = 0.0
    """Largest difference in relation to the number of the first store."""
    _squares: float = 0.0
    _norm: float = 0.0

    @property
    def rms(self) -> float:
        """Root of the squared differences in relation to that of the first store's numbers."""
        return float(np.sqrt(self._squares / self._norm)) if self._norm else float(self._squares > 0)

    def add(self, one_UW: NDArray[Any], other_UW: NDArray[Any]) -> None:
        """Take in decoded numbers of both stores."""
        same = (one_UW == other_UW) | (np.isnan(one_UW) & np.isnan(other_UW))
        self.values += same.size
        self.differing += int(same.size - same.sum())
        finite = np.isfinite(one_UW) & np.isfinite(other_UW)
        one, other = one_UW[finite].astype(np.float64), other_UW[finite].astype(np.float64)
        self._squares += float(((one - other) ** 2).sum())
        self._norm += float((one**2).sum())
        if (~same & ~finite).any():
            self.largest = self.relative = np.inf
        if len(apart := np.abs(one - other)):
            self.largest = max(self.largest, float(apart.max()))
            with np.errstate(divide="ignore", invalid="ignore"):
                self.relative = max(self.relative, float(np.nan_to_num(apart / np.abs(one), posinf=np.inf).max()))


@dataclass
class Compared:
    """One feature in both stores."""

    specs: tuple[FeatureSpec, FeatureSpec]
    shards: int = 0
    """Of the first store, whose rows both stores have committed."""
    arrays: dict[str, Apart] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        return not any(apart.differing for apart in self.arrays.values())


@dataclass
class Difference:
    """What two stores have in common and what not."""

    rows: tuple[int, int]
    compared: int = 0
    """Rows that both have, by number."""
    differing: list[int] = field(default_factory=list)
    """Numbers of rows whose tokens, labels, split, domain, draw or group are not the same; their features are not compared."""
    features: dict[str, Compared] = field(default_factory=dict)
    only: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    """Features that only the first store has, and only the second."""
    shards: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Pass (by both names where they differ) -> rows that only the first, and only the second store has answers for."""

    @property
    def equal(self) -> bool:
        """Whether both hold the same numbers."""
        whole = self.rows[0] == self.rows[1] and not self.differing and not any(self.only) and not any(map(any, self.shards.values()))
        return whole and all(compared.equal for compared in self.features.values())


def diff(paths: tuple[Path, Path], passes: Mapping[str, str] | None = None) -> Difference:
    """Compare two stores row by row, by number; values as they are decoded, however they are stored.

    Args:
        passes: Pass of the first store -> pass of the second to compare it with; by default all, by name.

    Raises:
        ValueError: a store has no such pass.
        StoreError: a store cannot be read.
    """
    one, other = Store.open(paths[0]), Store.open(paths[1])
    found = Difference((len(one.rows), len(other.rows)))
    pairs = _pairs(one, other, passes, found)
    common = min(found.rows)
    for slot in range(one.manifest.rows.slots):
        rows = one.rows.rows_of(slot)
        rows = rows[rows < common]
        same = _same_rows(one, other, rows)
        found.compared += len(rows)
        found.differing += rows[~same].tolist()
        for (name, of), specs in pairs.items():
            there = rows[same]
            have = slot in one.committed(name), np.isin(other.rows.at(there).slot, list(other.committed(of)))
            mine, theirs = found.shards[_title(name, of)]
            found.shards[_title(name, of)] = (
                mine + (int((~have[1]).sum()) if have[0] else 0),
                theirs + (0 if have[0] else int(have[1].sum())),
            )
            if have[0] and len(there := there[have[1]]):
                for compared in specs:
                    _compare((one, other), (name, of), compared, there)
    return found


def _title(name: str, of: str) -> str:
    return name if name == of else f"{name} and {of}"


def _pairs(one: Store, other: Store, passes: Mapping[str, str] | None, found: Difference) -> dict[tuple[str, str], list[Compared]]:
    """Passes to compare, and the features that both have."""
    known = one.manifest.passes, other.manifest.passes
    for store, name in [pair for names in (passes or {}).items() for pair in zip((one, other), names, strict=True)]:
        if name not in store.manifest.passes:
            raise ValueError(f"{store.path} has no pass {name!r}{did_you_mean(name, sorted(store.manifest.passes))}")
    if passes is None:
        for mine, theirs, only in ((*known, found.only[0]), (known[1], known[0], found.only[1])):
            only += [f"{name}/{spec.key}" for name in mine if name not in theirs for spec in mine[name].features]
        passes = {name: name for name in known[0] if name in known[1]}
    pairs: dict[tuple[str, str], list[Compared]] = {}
    for names in passes.items():
        found.shards[_title(*names)] = (0, 0)
        specs = [{spec.key: spec for spec in manifest[name].features} for manifest, name in zip(known, names, strict=True)]
        for number in (0, 1):
            found.only[number].extend(f"{names[number]}/{key}" for key in specs[number] if key not in specs[1 - number])
        both = [Compared((spec, specs[1][key])) for key, spec in specs[0].items() if key in specs[1]]
        pairs[names] = both
        found.features |= {f"{_title(*names)}/{compared.specs[0].key}": compared for compared in both}
    return pairs


def _same_rows(one: Store, other: Store, rows: Ints) -> NDArray[np.bool_]:
    """[n] whether both stores have the same row under each number."""
    mine, theirs = one.rows.at(rows), other.rows.at(rows)
    same: NDArray[np.bool_] = (mine.length == theirs.length) & (mine.labelled == theirs.labelled) & (mine.copy == theirs.copy)
    same &= np.array(one.rows.splits)[mine.split] == np.array(other.rows.splits)[theirs.split]
    labels = one.rows.label_at(rows), other.rows.label_at(rows)
    same &= (labels[0] == labels[1]) | (np.isnan(labels[0]) & np.isnan(labels[1]))
    domains = [_domains(store, rows) for store in (one, other)]
    same &= domains[0] == domains[1]
    draws = [store.rows.draw_at(rows) if store.manifest.rows.paired else np.full(len(rows), -1) for store in (one, other)]
    same &= draws[0] == draws[1]
    begins = [np.diff(numbers.group, prepend=-1) != 0 for numbers in (mine, theirs)]
    same &= begins[0] == begins[1]
    if len(rows) and rows[0] > 0:  # a slot begins a group in the store whose slot it is, and must do so in the other one
        before = theirs.group[0] == other.rows.at(rows[:1] - 1).group[0]
        same[0] &= not before
    arrays = [{array.name for array in store.manifest.rows.token_arrays} for store in (one, other)]
    if arrays[0] != arrays[1]:
        return np.zeros(len(rows), np.bool_)
    alike = rows[same]
    if len(alike):
        lengths = one.rows.at(alike).length
        for name in sorted(arrays[0]):
            unlike_T = one.tokens(name, alike) != other.tokens(name, alike)
            same[np.flatnonzero(same)] &= np.add.reduceat(unlike_T, np.cumsum(lengths) - lengths) == 0
            alike, lengths = rows[same], lengths[same[np.isin(rows, alike)]]
            if not len(alike):
                break
    return same


def _domains(store: Store, rows: Ints) -> NDArray[np.str_]:
    """[n] names of the domains of ``rows``; empty where the store has none."""
    names = store.manifest.rows.domains
    return np.array(names)[store.rows.domain_at(rows)] if names else np.full(len(rows), "")


def _compare(stores: tuple[Store, Store], names: tuple[str, str], compared: Compared, rows: Ints) -> None:
    """Take in what both stores hold of a feature for ``rows`` of one slot of the first."""
    compared.shards += 1
    for some in cut(stores[0], rows, compared.specs[0]):
        values = [
            decode(spec, store.read(spec.feature.of(name), some)) for store, name, spec in zip(stores, names, compared.specs, strict=True)
        ]
        for array in values[0].keys() | values[1].keys():
            if array not in values[0] or array not in values[1]:
                raise MissingFeature(f"{compared.specs[0].key}: only one of the stores has the array {array}")
            if values[0][array].shape != values[1][array].shape:
                sizes = [list(value[array].shape) for value in values]
                raise ValueError(f"{compared.specs[0].key}: its values have different widths, {sizes[0]} and {sizes[1]}")
            compared.arrays.setdefault(array, Apart()).add(values[0][array], values[1][array])
