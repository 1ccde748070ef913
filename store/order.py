"""Which rows make up each training step: a pure function of the seed and the sources, whatever the number of ranks.

A *unit* is a run of rows that stay together (the choices of a question; usually one row). A *source* yields its units in
a new order each epoch, without end: the last units of an epoch share a step with the first of the next. A *step* takes
all its units from one source, so that every rank agrees which features there are; the sources take turns in a cycle of
``steps_per_epoch`` steps, in which each comes by its weight times.

Random numbers come from Philox, keyed by the seed and counted by source and epoch, so that any step can be asked for
without those before it. Nothing depends on how many ranks or accumulation slots share a step: they cut its units into
consecutive, nearly equal parts.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from store.table import Ints, RowTable

_TURNS = 2**64 - 1
"""Philox key of the cycle, which no source has."""


@dataclass(frozen=True, eq=False)
class Units:
    """Rows that stay together: unit u holds ``rows[starts[u]:starts[u + 1]]``."""

    rows: Ints
    starts: Ints
    """[units + 1]"""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def take(self, chosen: Ints) -> Ints:
        """Rows of the ``chosen`` units, in order."""
        first, lengths = self.starts[chosen], self.starts[chosen + 1] - self.starts[chosen]
        before = np.cumsum(lengths) - lengths
        return self.rows[np.repeat(first - before, lengths) + np.arange(lengths.sum())]


@dataclass(frozen=True, eq=False)
class Source:
    """Units of one store and split. Epoch e reads ``copies[e % len(copies)]``, which all hold as many units."""

    copies: tuple[Units, ...]
    weight: float = 1.0
    """How often the units come by in a cycle."""

    def __post_init__(self) -> None:
        sizes = {len(units) for units in self.copies}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(f"expected copies of one size, with at least one unit, found {[len(units) for units in self.copies]} units")
        if not self.weight > 0:
            raise ValueError(f"expected a weight above 0, found {self.weight}")

    def __len__(self) -> int:
        return len(self.copies[0])


def units_of(rows: Ints, groups: Ints) -> Units:
    """Consecutive ``rows`` with equal ``groups`` (one entry for each row) as units."""
    starts = np.flatnonzero(np.concatenate([[True], groups[1:] != groups[:-1], [True]])) if len(rows) else np.zeros(1, np.int64)
    return Units(rows, starts)


def source_of(table: RowTable, split: str | None, weight: float = 1.0) -> Source:
    """The rows of a split (all with None) as a source, one copy for each masking copy of the store."""
    chosen = [table.select(split, copy) for copy in range(table.info.copies)]
    return Source(tuple(units_of(rows, table.columns.group[rows]) for rows in chosen), weight)


@dataclass(frozen=True)
class Order:
    """The endless sequence of steps over ``sources``, each of ``step_units`` units."""

    sources: tuple[Source, ...]
    step_units: int
    seed: int

    def __post_init__(self) -> None:
        if not self.sources or self.step_units < 1:
            raise ValueError(f"expected at least one source and one unit a step, found {len(self.sources)} and {self.step_units}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"expected a seed from 0 to 2**64 - 1, found {self.seed}")

    @property
    def turns(self) -> tuple[int, ...]:
        """Steps of each source in a cycle: its units times its weight, to the nearest whole step, at least one."""
        return tuple(max(1, round(source.weight * len(source) / self.step_units)) for source in self.sources)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a cycle over all sources."""
        return sum(self.turns)

    def step(self, step: int) -> tuple[int, Ints]:
        """Number of the source that ``step`` (from 0) reads, and its rows."""
        return self.part(step, rank=0, world=1)

    def part(self, step: int, rank: int, world: int, slot: int = 0, accumulation: int = 1) -> tuple[int, Ints]:
        """Source of ``step`` and the rows that ``rank`` of ``world`` reads in accumulation ``slot`` of ``accumulation``.

        Raises:
            ValueError: there are more parts than units in a step.
        """
        parts, number = world * accumulation, slot * world + rank
        if parts > self.step_units:
            raise ValueError(f"a step of {self.step_units} units cannot be shared by {world} ranks with {accumulation} accumulation steps")
        source, earlier = self.turn(step)
        first = earlier * self.step_units
        ours = first + self.step_units * number // parts, first + self.step_units * (number + 1) // parts
        return source, self.stream(source, *ours)

    def turn(self, step: int) -> tuple[int, int]:
        """Source of ``step``, and how many earlier steps read the same source."""
        turns = self.turns
        cycle, place = divmod(step, sum(turns))
        order = _cycle(self.seed, cycle, turns)
        source = int(order[place])
        return source, cycle * turns[source] + int(np.count_nonzero(order[:place] == source))

    def stream(self, source: int, start: int, stop: int) -> Ints:
        """Rows of the units at positions ``start`` to ``stop`` of a source's endless stream."""
        size, copies = len(self.sources[source]), self.sources[source].copies
        rows = []
        while start < stop:
            epoch, place = divmod(start, size)
            chosen = _permutation(self.seed, source, epoch, size)[place : place + stop - start]
            rows.append(copies[epoch % len(copies)].take(chosen))
            start += len(chosen)
        return np.concatenate(rows)


@lru_cache(maxsize=16)
def _permutation(seed: int, source: int, epoch: int, size: int) -> Ints:
    """Order of a source's units in an epoch. Sorting raw Philox numbers gives the same in every release of NumPy."""
    numbers = np.random.Philox(key=np.array([seed, source], np.uint64), counter=np.array([0, 0, 0, epoch], np.uint64)).random_raw(size)
    return np.argsort(numbers, kind="stable")


@lru_cache(maxsize=4)
def _cycle(seed: int, cycle: int, turns: tuple[int, ...]) -> Ints:
    """Source of each step in a cycle."""
    return np.repeat(np.arange(len(turns)), turns)[_permutation(seed, _TURNS, cycle, sum(turns))]
