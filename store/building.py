"""Row building: rows stream into slots and Parquet parts; the manifest, written last, commits them all."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from store import commits, hierarchy, layout
from store.errors import StoreError
from store.features import ArraySpec
from store.manifest import SCHEMA, Filled, Json, Manifest, Origin, Part, Provenance, RowsInfo, Task
from store.publish import file_crc32c, make_folder, sync_file, sync_folder
from store.rows import COLUMNS, ROW_ARRAYS, Row
from store.shards import CHUNK, Shard, token_chunk, write_slot

TOKEN_ARRAYS: dict[str, ArraySpec] = {
    "input_ids": ArraySpec(name="input_ids", dtype="int32", width=1),
    "segments": ArraySpec(name="segments", dtype="uint8", width=1),
    "documents": ArraySpec(name="documents", dtype="uint16", width=1),
    "token_labels": ArraySpec(name="token_labels", dtype="int32", width=1),
}
"""What is kept for each token of a row; all but input_ids only where rows have it."""

_PART_ROWS = 1 << 16
"""Rows of one Parquet file, at least; a file ends with a slot."""


class RowWriter:
    """Builds the rows of a new store, larger than memory, in the order in which groups arrive.

    Nothing of it counts before :meth:`finish`; a build that was cut short is cleared away by the next one. Raises
    StoreBusy while another process builds, and StoreError where ``path`` holds anything else.
    """

    def __init__(self, path: Path, slot_tokens: int) -> None:
        if slot_tokens < CHUNK or slot_tokens % CHUNK:
            raise ValueError(f"slot_tokens: expected a multiple of {CHUNK}, found {slot_tokens}")
        self.path = path
        self.slot_tokens = slot_tokens
        self._exit = contextlib.ExitStack()
        _claim(path)
        self._exit.enter_context(commits.locked(path))
        with self._closing_on_error():
            _clear(path)
            for name in ROW_ARRAYS:
                make_folder(layout.rows_array(path, name))
        self._arrays: dict[str, ArraySpec] = {}
        self._slot: list[Row] = []
        self._filled = 0
        self._slots: list[tuple[int, int, int]] = []
        self._splits: Counter[str] = Counter()
        self._crcs: dict[str, list[int]] = {name: [] for name in ROW_ARRAYS}
        self._table: dict[str, list[Any]] = {name: [] for name in COLUMNS.names}
        self._parts: list[Part] = []

    def append_group(self, rows: Sequence[Row]) -> None:
        """Add rows that must be read together; they share a slot.

        Raises:
            ValueError: the rows do not fit in a slot, or a row contradicts itself or the rows before it.
        """
        if not rows:
            raise ValueError("expected at least one row in a group, found none")
        if not self._arrays:
            self._start(rows[0])
        for row in rows:
            self._check(row)
        tokens = sum(len(row.input_ids) for row in rows)
        if tokens > self.slot_tokens:
            raise ValueError(
                f"{_where(rows[0])}: a group of {tokens} tokens in {len(rows)} rows does not fit in a slot of {self.slot_tokens}; "
                "raise slot_tokens or shorten the rows"
            )
        if self._filled + tokens > self.slot_tokens:
            self._flush_slot()
        self._slot += rows
        self._filled += tokens

    def finish(
        self,
        *,
        copies: int,
        bucket: int,
        objective: str,
        task: Task,
        pad_id: int,
        tokenizer: str,
        corpus: str,
        building: str,
        options: Json,
        made: Provenance,
    ) -> RowsInfo:
        """Commit the rows: write what is left and, last, the manifest. The arguments are those of RowsInfo, Origin and Manifest."""
        self._flush_slot()
        self._flush_part()
        if not self._parts:
            raise ValueError("expected at least one row, found none; is the corpus empty?")
        rows, tokens, labelled = zip(*self._slots, strict=True)
        info = RowsInfo(
            rows=sum(rows),
            tokens=sum(tokens),
            slots=len(rows),
            slot_tokens=self.slot_tokens,
            chunk_tokens=token_chunk(self.slot_tokens),
            filled=Filled(rows=rows, tokens=tokens, labelled=labelled),
            copies=copies,
            bucket=bucket,
            objective=objective,
            task=task,
            splits=dict(self._splits),
            parts=tuple(self._parts),
            token_arrays=tuple(self._arrays.values()),
            slot_crcs={name: tuple(crcs) for name, crcs in self._crcs.items()},
            pad_id=pad_id,
            tokenizer=tokenizer,
            building=building,
            origins=(Origin(corpus=corpus, options=options, slots=len(rows)),),
        )
        sync_folder(self.path / "rows")
        hierarchy.write(self.path, Manifest(schema_version=SCHEMA, rows=info, passes={}, made=made))
        layout.building(self.path).unlink()
        self.close()
        return info

    def close(self) -> None:
        """Let other processes build; without :meth:`finish` the rows are lost."""
        self._exit.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @contextlib.contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _start(self, row: Row) -> None:
        self._arrays = {name: spec for name, spec in TOKEN_ARRAYS.items() if getattr(row, name) is not None}
        self._crcs |= {name: [] for name in self._arrays}
        for name in self._arrays:
            make_folder(layout.tokens(self.path, name))

    def _check(self, row: Row) -> None:
        length = len(row.input_ids)
        if not length:
            raise ValueError(f"{_where(row)}: the row has no tokens")
        for name, spec in TOKEN_ARRAYS.items():
            values = getattr(row, name)
            if (values is not None) != (name in self._arrays):
                raise ValueError(f"{_where(row)}: {name} must be in all rows or in none")
            if values is not None and (values.shape != (length,) or values.dtype != spec.dtype):
                raise ValueError(f"{_where(row)}: {name}: expected {spec.dtype} [{length}], found {values.dtype} {list(values.shape)}")
        if not 0 <= row.labelled <= length:
            raise ValueError(f"{_where(row)}: labelled: expected 0 to {length}, found {row.labelled}")
        for start, end in row.spans:
            if not 0 <= start < end <= length:
                raise ValueError(f"{_where(row)}: span ({start}, {end}) does not lie in the row's {length} tokens")

    def _flush_slot(self) -> None:
        if not self._slot:
            return
        slot, rows = len(self._slots), len(self._slot)
        for name, spec in self._arrays.items():
            values: NDArray[Any] = np.concatenate([getattr(row, name) for row in self._slot])
            path = layout.slot_file(layout.tokens(self.path, name), slot, dimensions=1)
            shard = Shard(spec, self.slot_tokens, self._filled, token_chunk(self.slot_tokens))
            self._crcs[name].append(write_slot(path, values, shard).crc32c)
        for row in self._slot:
            self._splits.setdefault(row.split, 0)
        codes = {name: code for code, name in enumerate(self._splits)}
        labels = np.array([np.nan if row.label is None else row.label for row in self._slot])
        for name, kept in (("numbers", _numbers(self._slot, codes)), ("label", labels)):
            path = layout.slot_file(layout.rows_array(self.path, name), slot)
            self._crcs[name].append(write_slot(path, kept, Shard(ROW_ARRAYS[name], self.slot_tokens, rows)).crc32c)
        for row in self._slot:
            spans = [{"start": start, "end": end} for start, end in row.spans]
            about = (row.split, row.copy, len(row.input_ids), row.label, row.source, row.record, row.part, spans)
            for name, value in zip(COLUMNS.names, about, strict=True):
                self._table[name].append(value)
        self._splits.update(row.split for row in self._slot)
        self._slots.append((rows, self._filled, sum(row.labelled for row in self._slot)))
        self._slot, self._filled = [], 0
        if len(self._table["split"]) >= _PART_ROWS:
            self._flush_part()

    def _flush_part(self) -> None:
        rows = len(self._table["split"])
        if not rows:
            return
        path = layout.rows_part(self.path, len(self._parts))
        try:
            pq.write_table(pa.table(self._table, COLUMNS), path)
            sync_file(path)
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror or error}; make room or rights and start again") from error
        self._parts.append(Part(file=path.name, rows=rows, crc32c=file_crc32c(path)))
        self._table = {name: [] for name in COLUMNS.names}


def _numbers(rows: Sequence[Row], splits: dict[str, int]) -> NDArray[np.int32]:
    """[r, store.rows.NUMBERS] of the rows of a slot."""
    length, labelled = (np.array(counts) for counts in zip(*((len(row.input_ids), row.labelled) for row in rows), strict=True))
    group = np.array([row.group for row in rows])
    within = np.cumsum(np.concatenate([[False], group[1:] != group[:-1]]))
    copy, split = np.array([row.copy for row in rows]), np.array([splits[row.split] for row in rows])
    numbers = [np.cumsum(length) - length, length, labelled, np.cumsum(labelled) - labelled, within, copy, split]
    return np.stack(numbers, axis=1).astype(np.int32)


def _where(row: Row) -> str:
    return f"{row.source}, record {row.record}"


def _claim(path: Path) -> None:
    """Make ``path`` a folder that is being built, or refuse it untouched."""
    if layout.manifest(path).exists():
        raise StoreError(f"{path} already holds a finished store; give another folder, or remove this one to build its rows anew")
    if path.exists() and not path.is_dir():
        raise StoreError(f"expected a folder for the store, found a file: {path}")
    if not layout.building(path).exists() and path.exists() and any(path.iterdir()):
        kind = "a Python package" if (path / "__init__.py").exists() else "something else"
        raise StoreError(
            f"expected an empty or new folder for the store, but {path} holds {kind}; nothing was touched, give another folder"
        )
    try:
        make_folder(path)
        layout.building(path).touch()
        sync_folder(path)
    except OSError as error:
        raise StoreError(f"cannot make the store {path}: {error.strerror}; give a folder that can be written") from error


def _clear(path: Path) -> None:
    """Remove what an unfinished build left, and nothing else."""
    slots = r"zarr\.json|c\.\d+(\.0)?|\.(zarr\.json|c\.\d+(\.0)?)\.0\.tmp"
    ours = {
        **{layout.rows_array(path, name): slots for name in ROW_ARRAYS},
        path / "rows": r"part-\d{5,}\.parquet|zarr\.json|\.zarr\.json\.0\.tmp",
        **{layout.tokens(path, name): slots for name in TOKEN_ARRAYS},
        path / "tokens": r"zarr\.json|\.zarr\.json\.0\.tmp",
    }
    for folder, names in ours.items():
        if layout.inside(path, folder).is_dir():
            for file in folder.iterdir():
                if not re.fullmatch(names, file.name):
                    raise StoreError(
                        f"{path} holds an unfinished build and {file}, which is not part of it; move that away and start again"
                    )
                file.unlink()
            folder.rmdir()
    for file in (path / "zarr.json", layout.temporary(path / "zarr.json"), layout.temporary(layout.manifest(path))):
        file.unlink(missing_ok=True)
