"""The frozen inputs of every pass: rows on their way into a store (Row) and as they stand in one (RowTable)."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from store import layout
from store.errors import CorruptShard
from store.manifest import RowsInfo
from store.publish import file_crc32c
from store.strict import did_you_mean

Ints = NDArray[np.int64]

SPAN = pa.struct([("start", pa.int32()), ("end", pa.int32())])
COLUMNS = pa.schema(
    [
        ("slot", pa.int32()),
        ("offset", pa.int32()),
        ("length", pa.int32()),
        ("index", pa.int32()),
        ("labelled", pa.int32()),
        ("labelled_offset", pa.int32()),
        ("group", pa.int64()),
        ("copy", pa.int32()),
        ("split", pa.string()),
        ("label", pa.float64()),
        ("source", pa.string()),
        ("record", pa.int64()),
        ("part", pa.int32()),
        ("spans", pa.list_(SPAN)),
    ]
)
"""The row table on disk: one Parquet row for each row, in the order of their numbers."""


@dataclass
class Row:
    """One model input of n tokens, as row building hands it to the store."""

    input_ids: NDArray[np.int32]
    """[n] as the model sees them: masking, if any, is done."""
    segments: NDArray[np.uint8] | None
    """[n] token types."""
    documents: NDArray[np.uint16] | None
    """[n] number of the packed document that a token belongs to."""
    token_labels: NDArray[np.int32] | None
    """[n] label of each token or -100; only where labels do not follow from the tokens (masked words, token classes)."""
    labelled: int
    """Number of tokens that are scored against a label; for causal rows n minus the number of documents."""
    label: float | None
    """Class number or score of the row."""
    group: int
    """Rows of one group carry the same number."""
    copy: int
    """Which masking of the text this is."""
    split: str
    source: str
    """File the text came from."""
    record: int
    """Number of the text in its source."""
    part: int
    """Number of the row among those made from the record."""
    spans: list[tuple[int, int]]
    """Marked token ranges, half open."""


@dataclass(frozen=True)
class RowTable:
    """Rows as they stand in a store; columns are read when first asked for, [rows] each."""

    store: Path
    info: RowsInfo

    def __len__(self) -> int:
        return self.info.rows

    @cached_property
    def slot(self) -> Ints:
        """Slot that holds the row."""
        return self._addresses["slot"]

    @cached_property
    def offset(self) -> Ints:
        """First token of the row inside its slot."""
        return self._addresses["offset"]

    @cached_property
    def length(self) -> Ints:
        """Tokens of the row."""
        return self._addresses["length"]

    @cached_property
    def index(self) -> Ints:
        """Number of the row inside its slot."""
        return self._addresses["index"]

    @cached_property
    def labelled(self) -> Ints:
        """Labelled tokens of the row."""
        return self._addresses["labelled"]

    @cached_property
    def labelled_offset(self) -> Ints:
        """Labelled tokens of the earlier rows in the slot."""
        return self._addresses["labelled_offset"]

    @cached_property
    def group(self) -> Ints:
        """Group of the row; rows of a group stand together."""
        return self._ints("group")

    @cached_property
    def copy(self) -> Ints:
        """Which masking of its text the row is."""
        return self._ints("copy")

    @cached_property
    def label(self) -> NDArray[np.float64]:
        """Class number or score; NaN where the row has none."""
        return self._column("label").to_numpy().astype(np.float64)

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in the order of their codes."""
        return tuple(self.info.splits)

    @cached_property
    def split(self) -> Ints:
        """Code of the row's split: its place in ``splits``."""
        column = self._column("split").combine_chunks().dictionary_encode()
        names = column.dictionary.to_pylist()
        if unknown := set(names) - set(self.splits):
            raise self._damaged(f"holds splits {sorted(map(str, unknown))} that the manifest does not")
        codes = np.array([self.splits.index(name) for name in names], np.int64)
        return codes[column.indices.to_numpy(zero_copy_only=False)]

    @cached_property
    def table(self) -> pa.Table:
        """All columns (store.rows.COLUMNS), where a row came from and its spans included."""
        return pa.concat_tables([self._part(number) for number in range(len(self.info.parts))])

    def select(self, split: str | None, copy: int | None = None) -> Ints:
        """Numbers of the rows of a split (all with None) and of one masking copy (all with None), ascending."""
        if split is not None and split not in self.splits:
            raise ValueError(f"{self.store} has no split {split!r}{did_you_mean(split, self.splits)}")
        if copy is not None and not 0 <= copy < self.info.copies:
            raise ValueError(f"{self.store} has masking copies 0 to {self.info.copies - 1}, found {copy}")
        chosen = np.ones(len(self), bool)
        if split is not None:
            chosen &= self.split == self.splits.index(split)
        if copy is not None:
            chosen &= self.copy == copy
        return np.flatnonzero(chosen)

    @cached_property
    def slot_rows(self) -> Ints:
        """[slots] rows of each slot."""
        return np.bincount(self.slot, minlength=self.info.slots)

    @cached_property
    def slot_tokens(self) -> Ints:
        """[slots] tokens of each slot."""
        return self._per_slot(self.length)

    @cached_property
    def slot_labelled(self) -> Ints:
        """[slots] labelled tokens of each slot."""
        return self._per_slot(self.labelled)

    def units(self, positions: str) -> tuple[Ints, Ints, Ints]:
        """How values for ``positions`` lie in slots: first unit of each row, units of each row, units of each slot."""
        if positions == "all":
            return self.offset, self.length, self.slot_tokens
        if positions in ("masked", "labels"):
            return self.labelled_offset, self.labelled, self.slot_labelled
        return self.index, self._ones, self.slot_rows

    def problems(self) -> list[tuple[Path, str]]:
        """Damaged files of the table and what is wrong with them."""
        found = []
        for number in range(len(self.info.parts)):
            try:
                self._part(number)
            except CorruptShard as error:
                found.append((layout.rows_part(self.store, number), str(error)))
        if not found:
            try:
                _ = self._addresses, self.split
            except CorruptShard as error:
                found.append((self.store / "rows", str(error)))
        return found

    @cached_property
    def _ones(self) -> Ints:
        return np.ones(len(self), np.int64)

    def _per_slot(self, of_row: Ints) -> Ints:
        return np.bincount(self.slot, of_row, self.info.slots).astype(np.int64)

    @cached_property
    def _addresses(self) -> dict[str, Ints]:
        """The address columns, after checking that they are what row building makes of lengths."""
        names = ("slot", "offset", "length", "index", "labelled", "labelled_offset")
        found = {name: self._ints(name) for name in names}
        slot, length, labelled = found["slot"], found["length"], found["labelled"]
        first = np.flatnonzero(np.diff(slot, prepend=-1))
        rows = np.arange(len(slot))

        def within(total: Ints) -> Ints:
            return total - np.repeat(total[first], np.diff(first, append=len(slot)))

        sound = (
            np.array_equal(slot[first], np.arange(self.info.slots))
            and bool((length > 0).all() and (labelled >= 0).all() and (labelled <= length).all())
            and np.array_equal(found["index"], within(rows))
            and np.array_equal(found["offset"], within(np.cumsum(length) - length))
            and np.array_equal(found["labelled_offset"], within(np.cumsum(labelled) - labelled))
            and int((found["offset"] + length).max()) <= self.info.slot_tokens
        )
        if not sound:
            raise self._damaged("holds addresses that rows cannot have")
        return found

    def _ints(self, name: str) -> Ints:
        return self._column(name).to_numpy().astype(np.int64)

    def _column(self, name: str) -> pa.ChunkedArray:
        """A column of all parts; each file is checked when it is first read."""
        return self._columns.column(name)

    @cached_property
    def _columns(self) -> pa.Table:
        names = [name for name in COLUMNS.names if name not in ("source", "record", "part", "spans")]
        return pa.concat_tables([self._part(number, names) for number in range(len(self.info.parts))])

    def _part(self, number: int, columns: list[str] | None = None) -> pa.Table:
        path, part = layout.rows_part(self.store, number), self.info.parts[number]
        try:
            found = file_crc32c(path)
        except FileNotFoundError:
            raise self._damaged(f"lacks {path.name}") from None
        if found != part.crc32c:
            raise self._damaged(f"has a damaged {path.name}: expected crc32c {part.crc32c}, found {found}")
        with pq.ParquetFile(path) as file:
            if not file.schema_arrow.equals(COLUMNS) or file.metadata.num_rows != part.rows:
                raise self._damaged(f"holds other columns or another number of rows than {part.rows} in {path.name}")
            return file.read(columns)

    def _damaged(self, what: str) -> CorruptShard:
        return CorruptShard(f"the row table of {self.store} {what}; rows cannot be mended: remove the folder and start the dump again")
