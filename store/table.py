"""The rows of a store: where each lies, what it is labelled with, and where it came from.

Shapes: R rows of the store, r rows of a slot, n rows that are asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from store import layout, schemas
from store.errors import CorruptShard
from store.features import ArraySpec
from store.manifest import RowsInfo
from store.opened import ArrayFiles, SlotFiles, Supply
from store.parts import read_part
from store.plain import why
from store.rows import COLUMNS, NUMBERS, ROW_ARRAYS
from store.shards import CHUNK, Seal, Shard, numpy_dtype
from store.strict import did_you_mean

Ints = NDArray[np.int64]

SMALL = 1 << 20
"""Rows up to which the table is kept in memory as a whole (64 MB); beyond, slots of it are looked at one by one."""


@dataclass
class Numbers:
    """What a store knows of n rows, [n] each."""

    slot: Ints
    index: Ints
    """Number of the row inside its slot."""
    offset: Ints
    """First token of the row inside its slot."""
    length: Ints
    """Tokens."""
    labelled: Ints
    """Tokens that are scored against a label."""
    labelled_offset: Ints
    """Labelled tokens of the earlier rows in the slot."""
    group: Ints
    """Rows of a group carry the same number; it is unique in the store."""
    copy: Ints
    """Which masking of its text the row is."""
    split: Ints
    """Place of its split in ``RowTable.splits``."""

    def units(self, positions: str) -> tuple[Ints, Ints]:
        """First unit of each row in its slot, and how many it has, in arrays with values for ``positions``."""
        if positions == "all":
            return self.offset, self.length
        if positions in ("masked", "labels"):
            return self.labelled_offset, self.labelled
        return self.index, np.ones(len(self.index), np.int64)


class RowSupply(Supply, Protocol):
    """Where the files of a row table come from that are not on this machine."""

    def part(self, rows: RowsInfo, number: int) -> None:
        """Have a Parquet file here."""


class RowTable:
    """Rows as they stand in a store. :meth:`at` is what readers use; the columns, [R] each, are for small stores."""

    def __init__(self, store: Path, info: RowsInfo, mapped: bool | None = None, supply: RowSupply | None = None) -> None:
        self.store = store
        self.info = info
        self.files = SlotFiles(store, mapped, supply)
        self._supply = supply
        self._sound: set[int] = set()
        self._kept: dict[str, NDArray[np.int32]] = {}

    def __len__(self) -> int:
        return self.info.rows

    @cached_property
    def first(self) -> Ints:
        """[slots + 1] number of the first row of each slot."""
        return np.concatenate([[0], np.cumsum(np.array(self.info.filled.rows, np.int64))])

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in the order of their codes."""
        return tuple(self.info.splits)

    def at(self, rows: Ints) -> Numbers:
        """Where ``rows`` [n] lie and what they are.

        Raises:
            CorruptShard: the files that say so are damaged.
        """
        slot = self.first.searchsorted(rows, "right") - 1
        index = rows - self.first[slot]
        if len(self) <= SMALL or self._from_parquet is not None:
            return _named(slot, index, self._numbers.take(rows, axis=0))
        for each in set(slot.tolist()) - self._sound:
            self.in_slot(each)
        return _named(slot, index, self._look_up("numbers", slot, index))

    def label_at(self, rows: Ints) -> NDArray[np.float64]:
        """[n] class number or score of ``rows``; NaN where they have none."""
        if len(self) <= SMALL or self._from_parquet is not None:
            return self.label[rows]
        slot = self.first.searchsorted(rows, "right") - 1
        labels: NDArray[np.float64] = self._look_up("label", slot, rows - self.first[slot])[:, 0]
        return labels

    def domain_at(self, rows: Ints) -> Ints:
        """[n] place of the domain of ``rows`` in RowsInfo.domains; only where the store has any.

        Raises:
            CorruptShard: the files that say so are damaged.
        """
        return self._checked("domain", rows)

    def domains_in(self, slot: int) -> Ints:
        """[r] the same for the rows of a slot."""
        return self._checked("domain", self.rows_of(slot))

    def draw_at(self, rows: Ints) -> Ints:
        """[n] the random numbers of ``rows`` (store.pairs); only where rows stand in pairs.

        Raises:
            CorruptShard: the files that say so are damaged.
        """
        return self._checked("draw", rows)

    def in_slot(self, slot: int) -> NDArray[np.int32]:
        """[r, NUMBERS] the rows of a slot, checked to be what row building makes."""
        if self._from_parquet is not None:
            return self._from_parquet[0][self.first[slot] : self.first[slot + 1]]
        numbers: NDArray[np.int32] = self._read("numbers", slot)
        if slot not in self._sound:
            self._check(slot, numbers)
            self._sound.add(slot)
        return numbers

    def rows_of(self, slot: int) -> Ints:
        """Numbers of the rows in a slot, ascending."""
        return np.arange(self.first[slot], self.first[slot + 1])

    def shard(self, array: ArraySpec, positions: str, slot: int, vocab: int | None = None) -> Shard:
        """The bytes of ``slot`` in an array with values for ``positions``; of features of a teacher with ``vocab`` words."""
        words = vocab if array.name == "ids" else None
        return Shard(array, self.info.slot_tokens, int(self.slot_units(positions)[slot]), self.info.chunk(array, positions), words)

    def slot_units(self, positions: str) -> Ints:
        """[slots] units of each slot in arrays with values for ``positions``."""
        if positions == "all":
            return self.slot_tokens
        return self.slot_labelled if positions in ("masked", "labels") else self.slot_rows

    @cached_property
    def slot_rows(self) -> Ints:
        """[slots] rows of each slot."""
        return np.array(self.info.filled.rows, np.int64)

    @cached_property
    def slot_tokens(self) -> Ints:
        """[slots] tokens of each slot."""
        return np.array(self.info.filled.tokens, np.int64)

    @cached_property
    def slot_labelled(self) -> Ints:
        """[slots] labelled tokens of each slot."""
        return np.array(self.info.filled.labelled, np.int64)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row."""
        length = NUMBERS.index("length")
        return max(int(self.in_slot(slot)[:, length].max()) for slot in range(self.info.slots))

    @cached_property
    def columns(self) -> Numbers:
        """All rows."""
        rows = np.arange(len(self))
        slot = np.repeat(np.arange(self.info.slots), self.slot_rows)
        return _named(slot, rows - self.first[slot], self._numbers)

    @cached_property
    def label(self) -> NDArray[np.float64]:
        """[R] class number or score; NaN where the row has none."""
        self.bring("label")
        return np.concatenate([self._labels_in(slot) for slot in range(self.info.slots)])

    @cached_property
    def table(self) -> pa.Table:
        """All Parquet columns (store.rows.COLUMNS), where a row came from and its spans included."""
        return pa.concat_tables([self.part(number, COLUMNS.names) for number in range(len(self.info.parts))])

    def about(self, row: int) -> dict[str, Any]:
        """The Parquet columns of one row."""
        number = int(np.searchsorted(np.cumsum([part.rows for part in self.info.parts]), row, "right"))
        before = sum(part.rows for part in self.info.parts[:number])
        found: dict[str, Any] = self.part(number, COLUMNS.names).slice(row - before, 1).to_pylist()[0]
        return found

    def select(self, split: str | None, copy: int | None = None) -> Ints:
        """Numbers of the rows of a split (all with None) and of one masking copy (all with None), ascending."""
        self.check_choice(split, copy)
        columns = self.columns
        chosen = np.ones(len(self), bool)
        if split is not None:
            chosen &= columns.split == self.splits.index(split)
        if copy is not None:
            chosen &= columns.copy == copy
        return np.flatnonzero(chosen)

    def check_choice(self, split: str | None, copy: int | None = None) -> None:
        """Raise a ValueError unless there are such a split and such a masking copy."""
        if split is not None and split not in self.splits:
            raise ValueError(f"{self.store} has no split {split!r}{did_you_mean(split, self.splits)}")
        if copy is not None and not 0 <= copy < self.info.copies:
            raise ValueError(f"{self.store} has masking copies 0 to {self.info.copies - 1}, found {copy}")

    def part(self, number: int, columns: Sequence[str]) -> pa.Table:
        """Columns of Parquet file ``number``, checked.

        Raises:
            CorruptShard: it is not the file that row building wrote.
        """
        return self._part(number, columns, self.info.parts[number].crc32c)

    def check_part(self, number: int) -> None:
        """Raise a CorruptShard where the end of Parquet file ``number`` does not say what the manifest does; the rest is not read."""
        self._part(number, (), None)

    def _part(self, number: int, columns: Sequence[str], crc: int | None) -> pa.Table:
        if self._supply is not None:
            self._supply.part(self.info, number)
        path, rows = layout.rows_part(self.store, number), self.info.parts[number].rows
        layout.inside(self.store, path.parent)
        schema = COLUMNS if "numbers" in self.info.slot_crcs else schemas.COLUMNS_1
        try:
            return read_part(path, rows, crc, schema, columns)
        except OSError as error:
            raise self._damaged(f"lacks {path.name}: {why(error)}") from None
        except ValueError as error:
            raise self._damaged(f"has a damaged {path.name}: {error}") from None

    @cached_property
    def _from_parquet(self) -> tuple[NDArray[np.int32], NDArray[np.float64]] | None:
        """Numbers and labels of a store whose schema has them in Parquet only."""
        if "numbers" in self.info.slot_crcs:
            return None
        tables = [self.part(number, schemas.COLUMNS_1.names) for number in range(len(self.info.parts))]
        numbers, label = schemas.numbers_1(tables, self.splits)
        for slot in range(self.info.slots):
            self._check(slot, numbers[self.first[slot] : self.first[slot + 1]])
        return numbers, label

    @cached_property
    def _numbers(self) -> NDArray[np.int32]:
        """[R, NUMBERS]"""
        self.bring("numbers")
        return np.concatenate([self.in_slot(slot) for slot in range(self.info.slots)])

    def _checked(self, name: str, rows: Ints) -> Ints:
        """[n] domains or draws of ``rows``."""
        if len(self) <= SMALL:
            if name not in self._kept:
                self.bring(name)
                self._kept[name] = np.concatenate([self._read(name, slot) for slot in range(self.info.slots)])
            stored = self._kept[name][rows]
        else:
            slot = self.first.searchsorted(rows, "right") - 1
            stored = self._look_up(name, slot, rows - self.first[slot])
        numbers: Ints = stored[:, 0].astype(np.int64)
        if name == "draw" and (numbers < 0).any():
            raise self._damaged("holds draws below 0")
        if name == "domain" and ((numbers < 0) | (numbers >= len(self.info.domains))).any():
            raise self._damaged(f"holds rows of domains other than its {len(self.info.domains)}")
        return numbers

    def _labels_in(self, slot: int) -> NDArray[np.float64]:
        if self._from_parquet is not None:
            return self._from_parquet[1][self.first[slot] : self.first[slot + 1]]
        labels: NDArray[np.float64] = self._read("label", slot)
        return labels[:, 0]

    def _read(self, name: str, slot: int) -> NDArray[Any]:
        """The rows of a slot in one of the ROW_ARRAYS."""
        file = self._files(name)[slot]
        rows = file.shard.units
        for chunk in range(file.shard.chunks):
            if not file.checked(chunk):
                file.check(chunk)
        return np.concatenate([file.chunks[start // CHUNK, slice(0, min(CHUNK, rows - start))] for start in range(0, rows, CHUNK)])

    def _look_up(self, name: str, slot: Ints, index: Ints) -> NDArray[Any]:
        """[n, W] of rows (their slots, and numbers there) in one of the ROW_ARRAYS."""
        places = zip(slot.tolist(), index.tolist(), strict=True)
        runs = [(each, (row // CHUNK, slice(row % CHUNK, row % CHUNK + 1))) for each, row in places]
        out = np.empty((len(runs), ROW_ARRAYS[name].width), numpy_dtype(ROW_ARRAYS[name]))
        self._files(name).gather(set(slot.tolist()), runs, out)
        return out

    def _files(self, name: str) -> ArrayFiles:
        return self.files.of(layout.rows_array(self.store, name), self._find(name), _ANEW)

    def bring(self, name: str) -> None:
        """Have all of one of the ROW_ARRAYS here: all slots at once take far less time than one after the other."""
        if name in self.info.slot_crcs:
            self.files.bring([(self._files(name), range(self.info.slots))])

    def _find(self, name: str) -> Callable[[int], tuple[Shard, Seal | None]]:
        def find(slot: int) -> tuple[Shard, Seal | None]:
            shard = self.shard(ROW_ARRAYS[name], "row", slot)
            return shard, Seal(shard.size, self.info.slot_crcs[name][slot])

        return find

    def _check(self, slot: int, numbers: NDArray[np.int32]) -> None:
        offset, length, labelled, labelled_offset, group, copy, split = numbers.T.astype(np.int64)
        sound = (
            bool((length > 0).all() and (labelled >= 0).all() and (labelled <= length).all())
            and np.array_equal(offset, np.cumsum(length) - length)
            and np.array_equal(labelled_offset, np.cumsum(labelled) - labelled)
            and group[0] == 0
            and bool(np.isin(np.diff(group), (0, 1)).all())
            and bool((copy >= 0).all() and (copy < self.info.copies).all() and (split >= 0).all() and (split < len(self.splits)).all())
            and (int(length.sum()), int(labelled.sum())) == (self.slot_tokens[slot], self.slot_labelled[slot])
        )
        if not sound:
            raise self._damaged(f"holds addresses in slot {slot} that rows cannot have")

    def _damaged(self, what: str) -> CorruptShard:
        return CorruptShard(f"the row table of {self.store} {what}; {_ANEW}")


_ANEW = "rows cannot be mended: remove the folder and start the dump again"


def _named(slot: Ints, index: Ints, numbers: NDArray[np.integer]) -> Numbers:
    offset, length, labelled, labelled_offset, group, copy, split = numbers.T.astype(np.int64)
    return Numbers(slot, index, offset, length, labelled, labelled_offset, (slot << 32) + group, copy, split)
