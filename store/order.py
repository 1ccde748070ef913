"""Which rows make up each training step: a pure function of the seed and the sources, whatever the number of ranks.

A *source* yields the units of a pool (rows that stay together; store.pool) in a new order each epoch, without end: the
last units of an epoch share a step with the first of the next. A *step* takes all its units from one source, so that
every rank agrees which features there are; the sources take turns in a cycle of ``steps_per_epoch`` steps, in which each
comes by its weight times. Nothing depends on how many ranks or accumulation slots share a step: they cut its units into
consecutive, nearly equal parts.

Any step can be asked for without those before it, and nothing is as long as a list of all rows: orders are keyed
bijections (store.permutation), and slots are found by the number of units in each. ``random`` mixes all units. ``block``
mixes the slots, and then the units of ``window`` slots at a time: of a large store, few files are read at a time.
``by_length`` sorts stretches of either by length, so that the rows of a step pad little.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, Protocol

import numpy as np

from store.permutation import Stream, permutation
from store.table import Ints

Shuffle = Literal["random", "block"]

WINDOW = 16
"""Slots that ``block`` mixes at a time where nothing else is said."""

_UNITS, _SLOTS, _STEPS, _TURNS = range(4)
"""Purposes of random numbers."""


class Drawn(Protocol):
    """What an order needs of a store.pool.Pool."""

    counts: Ints
    """[slots] units of each slot; they are numbered slot by slot."""
    rows: int
    """Rows of all units."""

    def take(self, units: Ints) -> Ints:
        """The rows of ``units``, in their order."""
        ...

    def lengths(self, units: Ints) -> Ints:
        """Tokens of the longest row of each of ``units``."""
        ...


@dataclass(frozen=True, eq=False)
class Source:
    """Units of one store and split. Epoch e reads ``copies[e % len(copies)]``."""

    copies: Sequence[Drawn]
    weight: float = 1.0
    """How often the units come by in a cycle."""
    shuffle: Shuffle = "random"
    window: int = WINDOW
    """Slots that ``block`` mixes at a time."""
    by_length: int | None = None
    """Steps whose units are sorted by length together; None: units stay mixed."""

    def __post_init__(self) -> None:
        if not self.sizes.any():
            raise ValueError("expected at least one unit to draw from, found none")
        if not (self.weight > 0 and self.window >= 1 and (self.by_length is None or self.by_length >= 1)):
            raise ValueError(f"expected a weight above 0 and windows of at least 1, found {self.weight}, {self.window}, {self.by_length}")

    @cached_property
    def sizes(self) -> Ints:
        """[copies] units of each."""
        return np.array([pool.counts.sum() for pool in self.copies], np.int64)

    @property
    def units(self) -> float:
        """Units of an average epoch."""
        return float(self.sizes.mean())

    def epoch_at(self, place: int) -> tuple[int, int, int]:
        """The epoch that ``place`` of the endless stream is in, and where it begins and ends."""
        ends = np.cumsum(self.sizes)
        round_, within = divmod(place, int(ends[-1]))
        copy = int(np.searchsorted(ends, within, "right"))
        end = round_ * int(ends[-1]) + int(ends[copy])
        return round_ * len(ends) + copy, end - int(self.sizes[copy]), end


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

    @cached_property
    def turns(self) -> tuple[int, ...]:
        """Steps of each source in a cycle: its units times its weight, to the nearest whole step, at least one."""
        return tuple(max(1, round(source.weight * source.units / self.step_units)) for source in self.sources)

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
        if len(self.sources) == 1:
            return 0, step
        cycle, place = divmod(step, self.steps_per_epoch)
        source, earlier = _turn(self.turns, self.seed, cycle, place)
        return source, cycle * self.turns[source] + earlier

    def stream(self, source: int, start: int, stop: int) -> Ints:
        """Rows of the units at positions ``start`` to ``stop`` of a source's endless stream."""
        drawn, rows = self.sources[source], []
        while start < stop:
            epoch, first, end = drawn.epoch_at(start)
            units = self._sorted if drawn.by_length else self._mixed
            after = min(stop, end)
            rows.append(drawn.copies[epoch % len(drawn.copies)].take(units(source, epoch, start, after, first, end)))
            start = after
        return np.concatenate(rows)

    def _mixed(self, source: int, epoch: int, start: int, stop: int, first: int, end: int) -> Ints:
        """The units at positions ``start`` to ``stop`` inside an epoch, which is from ``first`` to ``end``."""
        drawn, stream, places = self.sources[source], Stream(self.seed, source, epoch), np.arange(start - first, stop - first)
        if drawn.shuffle == "random":
            return permutation(end - first, stream)(places)
        return _blocks(drawn, stream)(places)

    def _sorted(self, source: int, epoch: int, start: int, stop: int, first: int, end: int) -> Ints:
        """The same, sorted by length."""
        units, stretch = [], (self.sources[source].by_length or 1) * self.step_units
        for number in range(start // stretch, -(-stop // stretch)):
            begin, after = max(first, number * stretch), min(end, (number + 1) * stretch)
            units.append(_stretch(self, source, epoch, begin, after, first, end)[max(start, begin) - begin : min(stop, after) - begin])
        return np.concatenate(units)


@lru_cache(maxsize=8)
def _blocks(source: Source, stream: Stream) -> Callable[[Ints], Ints]:
    """Position in an epoch -> unit, where ``source.window`` slots are mixed at a time."""
    counts = source.copies[stream.epoch % len(source.copies)].counts
    filled = np.flatnonzero(counts)
    slots = filled[permutation(len(filled), stream._replace(purpose=_SLOTS))(np.arange(len(filled)))]
    bounds = np.concatenate([[0], np.cumsum(counts[slots])])
    units = (np.cumsum(counts) - counts)[slots]
    edges = np.append(bounds[: -1 : source.window], bounds[-1])

    def find(places: Ints) -> Ints:
        windows = np.searchsorted(edges, places, "right") - 1
        mixed = np.empty_like(places)
        for window in range(int(windows[0]), int(windows[-1]) + 1):
            here = slice(*np.searchsorted(windows, [window, window + 1]))
            first, size = int(edges[window]), int(edges[window + 1] - edges[window])
            mixed[here] = first + permutation(size, stream._replace(part=window))(places[here] - first)
        slot = np.searchsorted(bounds, mixed, "right") - 1
        found: Ints = units[slot] + mixed - bounds[slot]
        return found

    return find


@lru_cache(maxsize=8)
def _stretch(order: Order, source: int, epoch: int, begin: int, after: int, first: int, end: int) -> Ints:
    """The units at positions ``begin`` to ``after``: sorted by length, cut into steps, and the steps mixed.

    Steps that the stretch shares with others keep their places, and get the shortest units.
    """
    drawn, size = order.sources[source], order.step_units
    units = order._mixed(source, epoch, begin, after, first, end)
    units = units[np.argsort(drawn.copies[epoch % len(drawn.copies)].lengths(units), kind="stable")]
    head, tail = min(-begin % size, len(units)), after % size
    if head + tail >= len(units):
        return units
    whole = units[head + tail :].reshape(-1, size)
    mixed = whole[permutation(len(whole), Stream(order.seed, source, epoch, _STEPS, begin))(np.arange(len(whole)))]
    return np.concatenate([units[:head], mixed.ravel(), units[head : head + tail]])


@lru_cache(maxsize=64)
def _turn(turns: tuple[int, ...], seed: int, cycle: int, place: int) -> tuple[int, int]:
    """The source at ``place`` of a cycle, and how many of its turns in the cycle come before.

    Turn m of a source's t falls at the moment (m + phase) / t of the cycle, with a random phase below 1: sources mix
    evenly. Before the moment place / total come at most ``len(turns)`` turns more or fewer than ``place``, so that the one
    at ``place`` is among the few that are near.
    """
    near, total = len(turns) + 2, sum(turns)
    phases = (Stream(seed, epoch=cycle, purpose=_TURNS).numbers(len(turns)) >> np.uint64(44)) / 2.0**20
    moments, sources, numbers, before = [], [], [], 0
    for source, (count, phase) in enumerate(zip(turns, phases, strict=True)):
        middle = place * count // total
        some = np.arange(max(0, middle - near), min(count, middle + near))
        moments.append((some + phase) / count)
        sources.append(np.full(len(some), source))
        numbers.append(some)
        before += max(0, middle - near)
    sources_, numbers_ = np.concatenate(sources), np.concatenate(numbers)
    one = np.lexsort((sources_, np.concatenate(moments)))[place - before]
    return int(sources_[one]), int(numbers_[one])
