"""What a training draws from: the units of a store that are of its split, of one masking copy, and meet its conditions.

A *unit* is a run of rows that stay together (the choices of a question; usually one row). Units are numbered slot by
slot. Of a large store a pool knows how many units each slot has; which rows they are is looked up slot by slot, where
not every row is a unit of its own. A filter costs one bit for each row of the slots that it keeps a part of.

Shapes: r rows of a slot, u units.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from store import table
from store.filters import Mask, Sources, Where, conditions
from store.reader import Store
from store.rows import NUMBERS
from store.table import Ints
from store.together import PassName

REMEMBERED = 256
"""Slots of a large store whose units are kept in memory."""

GROUP, COPY, SPLIT = (NUMBERS.index(name) for name in ("group", "copy", "split"))


class Units(NamedTuple):
    """Runs of rows, [u] each."""

    first: Ints
    """Number of the first row."""
    size: Ints
    """How many rows."""

    def rows(self) -> Ints:
        """The numbers of all rows."""
        before = np.cumsum(self.size) - self.size
        return np.repeat(self.first - before, self.size) + np.arange(self.size.sum())


@dataclass(eq=False)
class Pool:
    """The chosen units of one masking copy."""

    store: Store
    copy: int
    split: int | None
    """Code of the split; None: all."""
    counts: Ints
    """[slots] chosen units of each slot."""
    rows: int
    """Chosen rows."""
    kept: dict[int, NDArray[np.uint8]]
    """Slot -> rows that meet the conditions, as packed bits; slots of which all or no rows do are absent."""
    whole: Units | None
    """All of them, of a small store."""
    _recent: OrderedDict[int, Units] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self.first = np.concatenate([[0], np.cumsum(self.counts)])
        """[slots + 1] number of the first unit of each slot."""
        self._plain = self.counts == self.store.rows.slot_rows  # where every row is a unit

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recent": OrderedDict()}

    def take(self, units: Ints) -> Ints:
        """The rows of ``units``, in their order."""
        return self._find(units).rows()

    def lengths(self, units: Ints) -> Ints:
        """[u] tokens of the longest row of each of ``units``."""
        found = self._find(units)
        longest: Ints = np.maximum.reduceat(self.store.rows.at(found.rows()).length, np.cumsum(found.size) - found.size)
        return longest

    def _find(self, units: Ints) -> Units:
        if self.whole is not None:
            return Units(self.whole.first[units], self.whole.size[units])
        slot = np.searchsorted(self.first, units, "right") - 1
        place = units - self.first[slot]
        found = Units(self.store.rows.first[slot] + place, np.ones(len(units), np.int64))
        for each in np.unique(slot[~self._plain[slot]]).tolist():
            members = np.flatnonzero(slot == each)
            there = self._units_in(each)
            found.first[members], found.size[members] = there.first[place[members]], there.size[place[members]]
        return found

    def _units_in(self, slot: int) -> Units:
        if (units := self._recent.get(slot)) is None:
            rows = self.store.rows
            kept = np.unpackbits(self.kept[slot], count=int(rows.slot_rows[slot])).astype(np.bool_) if slot in self.kept else None
            units, copies = units_in(rows.in_slot(slot), int(rows.first[slot]), self.split, kept)
            units = self._recent[slot] = Units(units.first[copies == self.copy], units.size[copies == self.copy])
            if len(self._recent) > REMEMBERED:
                self._recent.popitem(last=False)
        else:
            self._recent.move_to_end(slot)
        return units


def units_in(numbers: NDArray[np.int32], first: int, split: int | None, kept: Mask | None) -> tuple[Units, Ints]:
    """The units of a slot, and the masking copy [u] that each is of.

    Args:
        numbers: [r, NUMBERS] its rows, of which the ``first`` has this number in the store.
        split: The split they must be of.
        kept: [r] which rows meet the conditions; units of which all rows do are kept.
    """
    chosen = np.arange(len(numbers)) if split is None else np.flatnonzero(numbers[:, SPLIT] == split)
    if not len(chosen):
        return Units(chosen, chosen), chosen
    group, copy = numbers[chosen, GROUP], numbers[chosen, COPY]
    starts = np.flatnonzero(np.concatenate([[True], (group[1:] != group[:-1]) | (copy[1:] != copy[:-1])]))
    units = Units(first + chosen[starts], np.diff(starts, append=len(chosen)))
    copies = copy[starts].astype(np.int64)
    if kept is not None:
        whole = np.logical_and.reduceat(kept[chosen], starts)
        units, copies = Units(units.first[whole], units.size[whole]), copies[whole]
    return units, copies


def pools(store: Store, split: str | None = None, where: Where | None = None, pass_name: PassName | None = None) -> tuple[Pool, ...]:
    """The units of ``split`` (all with None) that meet ``where``, a pool for each masking copy; looks at all rows once.

    Args:
        pass_name: The teacher pass, or passes, whose answers ``where`` is about.

    Raises:
        ValueError: no such split, or nothing meets the conditions; the message says how many rows each of them left.
        StoreError: what the conditions read is missing or damaged.
    """
    rows = store.rows
    rows.check_choice(split)
    code = None if split is None else rows.splits.index(split)
    asked = {} if where is None else conditions(where, store, pass_name)
    left = dict.fromkeys(["", *asked], 0)
    kept: dict[int, NDArray[np.uint8]] = {}
    counts = np.zeros((rows.info.copies, rows.info.slots), np.int64)
    row_counts = np.zeros(rows.info.copies, np.int64)
    small = len(rows) <= table.SMALL
    found: list[tuple[Units, Ints]] = []
    rows.bring("numbers")
    for slot in range(rows.info.slots):
        numbers, first = rows.in_slot(slot), int(rows.first[slot])
        passes = None
        if asked:
            passes = np.ones(len(numbers), np.bool_) if code is None else numbers[:, SPLIT] == code
            still = of_split = np.flatnonzero(passes)
            left[""] += len(still)
            for name, condition in asked.items():
                passes[still] = condition(first + still)
                still = np.flatnonzero(passes)
                left[name] += len(still)
            if 0 < len(still) < len(of_split):
                kept[slot] = np.packbits(passes)
        units, copies = units_in(numbers, first, code, passes)
        counts[:, slot] = np.bincount(copies, minlength=len(counts))
        row_counts += np.bincount(copies, units.size, len(counts)).astype(np.int64)
        if small:
            found.append((units, copies))
    if asked and not counts.any():
        raise ValueError(_nothing(store, split, asked, left))
    return tuple(
        Pool(store, copy, code, counts[copy], int(row_counts[copy]), kept, _joined(found, copy) if small else None)
        for copy in range(len(counts))
    )


def _joined(found: list[tuple[Units, Ints]], copy: int) -> Units:
    ours = [Units(units.first[copies == copy], units.size[copies == copy]) for units, copies in found]
    return Units(np.concatenate([units.first for units in ours]), np.concatenate([units.size for units in ours]))


def _nothing(store: Store, split: str | None, asked: dict[str, Any], left: dict[str, int]) -> str:
    steps = ", then ".join(f"{name} leaves {left[name]:,}" for name in asked)
    message = f"{store.where}: no row meets where: {f'split {split!r}' if split else 'it'} has {left['']:,} rows; {steps}"
    if left[list(asked)[-1]]:
        message += ", but no group of rows that belong together is left whole"
    if isinstance(sources := asked.get("source"), Sources) and not left["source"]:
        seen = sorted(sources.seen)
        message += f"; its sources are {', '.join(seen[:5])}{' ...' if len(seen) > 5 else ''}"
    return message
