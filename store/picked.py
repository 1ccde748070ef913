"""Some rows of a store, and how they were before they were stored, so that they can be stored again elsewhere."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from store.reader import Store
from store.rows import NUMBERS, TOKEN_ARRAYS, Row
from store.table import Ints


class Picked:
    """The rows that a copy takes: row i of the copy is the source's row ``rows(i, i + 1)[0]``."""

    def __init__(self, source: Store, split: str | None = None, between: tuple[int, int | None] | None = None) -> None:
        self.source, self.split, self.whole = source, split, split is None and between is None
        source.rows.check_choice(split)
        first, after = between or (0, None)
        after = len(source.rows) if after is None else after
        if not 0 <= first < after <= len(source.rows):
            raise ValueError(
                f"{source.path} has rows 0 to {len(source.rows) - 1}; expected some of them as FIRST:AFTER, found {first}:{after}"
            )
        self._first, self._after = first, after
        self._part: tuple[int, pa.Table] | None = None
        if not self.counts.any():
            raise ValueError(f"{source.path} has no rows of {self.taken}")

    @property
    def taken(self) -> str | None:
        """Which rows, for people; None for all."""
        said = [f"split {self.split}"] if self.split is not None else []
        if self._after - self._first < len(self.source.rows):
            said.append(f"rows {self._first} to {self._after - 1}")
        return None if self.whole else ", ".join(said)

    @cached_property
    def counts(self) -> Ints:
        """[slots] how many rows are taken of each slot of the source."""
        if self.whole:
            return self.source.rows.slot_rows
        return np.array([len(self.in_slot(slot)) for slot in range(self.source.manifest.rows.slots)])

    def rows(self, first: int, after: int) -> Ints:
        """Numbers in the source of rows ``first`` to ``after`` - 1 of the copy."""
        if self.whole:
            return np.arange(first, after)
        ends = np.cumsum(self.counts)
        slots = range(int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, after - 1, "right")) + 1)
        before = int(ends[slots[0]] - self.counts[slots[0]])
        return np.concatenate([self.in_slot(slot) for slot in slots])[first - before : after - before]

    def in_slot(self, slot: int) -> Ints:
        """Numbers of the rows that are taken of a slot of the source, ascending.

        Raises:
            ValueError: they are only some of a group.
        """
        rows = self.source.rows.rows_of(slot)
        if self.whole:
            return rows
        chosen = (rows >= self._first) & (rows < self._after)
        if not chosen.any():
            return rows[:0]
        numbers = self.source.rows.in_slot(slot)
        if self.split is not None:
            chosen &= numbers[:, NUMBERS.index("split")] == self.source.rows.splits.index(self.split)
        group = numbers[:, NUMBERS.index("group")]
        some = np.bincount(group, chosen)
        if (cut := (some > 0) & (some < np.bincount(group))).any():
            of_group = rows[group == np.flatnonzero(cut)[0]]
            raise ValueError(f"rows {of_group[0]} to {of_group[-1]} of {self.source.path} are read together; take all of them or none")
        return rows[chosen]

    def groups(self, slot: int) -> Iterator[list[Row]]:
        """The rows that are taken of a slot as they were before they were stored, group by group."""
        source, rows = self.source, self.in_slot(slot)
        if not len(rows):
            return
        numbers, labels = source.rows.at(rows), source.rows.label_at(rows)
        ends = np.cumsum(numbers.length).tolist()
        domains = source.rows.domain_at(rows) if source.manifest.rows.domains else None
        draws = source.rows.draw_at(rows) if source.manifest.rows.paired else None
        packed = {array.name: source.tokens(array.name, rows) for array in source.manifest.rows.token_arrays}
        group: list[Row] = []
        for place, about in enumerate(self._about(rows)):
            tokens: dict[str, Any] = {
                name: packed[name][ends[place] - int(numbers.length[place]) : ends[place]] if name in packed else None
                for name in TOKEN_ARRAYS
            }
            row = Row(
                **tokens,
                labelled=int(numbers.labelled[place]),
                label=None if np.isnan(labels[place]) else float(labels[place]),
                group=int(numbers.group[place]),
                copy=int(numbers.copy[place]),
                split=about["split"],
                source=about["source"],
                record=about["record"],
                part=about["part"],
                spans=[(span["start"], span["end"]) for span in about["spans"]],
                domain=None if domains is None else int(domains[place]),
                draw=None if draws is None else int(draws[place]),
            )
            if group and group[0].group != row.group:
                yield group
                group = []
            group.append(row)
        yield group

    def _about(self, rows: Ints) -> Iterator[dict[str, Any]]:
        """The Parquet columns of ``rows``, ascending; the file they were last found in is kept."""
        parts = [part.rows for part in self.source.manifest.rows.parts]
        first = np.cumsum(parts) - parts
        of_part = np.searchsorted(first, rows, "right") - 1
        for number in np.unique(of_part).tolist():
            if self._part is None or self._part[0] != number:
                self._part = number, self.source.rows.part(number, ("split", "source", "record", "part", "spans"))
            yield from self._part[1].take(rows[of_part == number] - first[number]).to_pylist()
