"""Row building: rows stream into slots and Parquet parts; the manifest, written last, commits them all.

A new store is begun here whatever it is made of; rows that are added to one that is there go into new slots and parts.
"""

import contextlib
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
from store.joins import joined
from store.manifest import SCHEMA, Filled, Json, Manifest, Origin, Part, Provenance, RowsInfo, Task, read_manifest
from store.pairs import sound
from store.parts import PART_ROWS
from store.publish import file_crc32c, make_folder, sync_file, sync_folder
from store.remote import local
from store.rows import COLUMNS, ROW_ARRAYS, TOKEN_ARRAYS, Row
from store.shards import CHUNK, Shard, token_chunk, write_slot
from store.strays import remove, row_strays
from store.unfinished import claim, clear


class RowWriter:
    """Builds the rows of a new store, larger than memory, in the order in which groups arrive.

    Nothing of it counts before :meth:`finish`; a build that was cut short is cleared away by the next one. Raises
    StoreBusy while another process builds, and StoreError where ``path`` holds anything else.

    Args:
        job: The command, where the store is made of others. It alone goes on after it was cut short.
        after: A finished store at ``path`` that the rows are added to.
    """

    def __init__(self, path: Path, slot_tokens: int, job: str = "", after: RowsInfo | None = None) -> None:
        if slot_tokens < CHUNK or slot_tokens % CHUNK:
            raise ValueError(f"slot_tokens: expected a multiple of {CHUNK}, found {slot_tokens}")
        self.path = local(path)
        self.slot_tokens = slot_tokens
        self._exit = contextlib.ExitStack()
        if after is None:
            claim(path, job)
        self._exit.enter_context(commits.exclusive(path))
        with self._closing_on_error():
            if after is None:
                claim(path, job)  # another process may have finished it before this one held it
                clear(path)
            else:
                _check_unchanged(path, after)
                remove(row_strays(path, after))  # a build that was cut short may have left some
            for name in ("numbers", "label"):
                make_folder(layout.rows_array(path, name))
        self._before = after
        self._first_slot, self._first_part = (after.slots, len(after.parts)) if after else (0, 0)
        self._chunk_tokens = after.chunk_tokens if after else token_chunk(slot_tokens)
        self._arrays: dict[str, ArraySpec] = {array.name: array for array in after.token_arrays} if after else {}
        self._slot: list[Row] = []
        self._filled = 0
        self._slots: list[tuple[int, int, int]] = []
        self._domains = 0
        self._splits: Counter[str] = Counter(dict.fromkeys(after.splits, 0) if after else ())
        self._of_rows: dict[str, ArraySpec] = after.row_arrays if after else {}
        self._crcs: dict[str, list[int]] = {name: [] for name in (*self._of_rows, *self._arrays)}
        self._table: dict[str, list[Any]] = {name: [] for name in COLUMNS.names}
        self._parts: list[Part] = []
        self._origins: list[Origin] = []

    @classmethod
    def adding(cls, path: Path) -> Self:
        """Add rows to the finished store at ``path``; its passes then have shards pending.

        Raises:
            StoreError: there is none, or it is of an older schema.
        """
        manifest = read_manifest(path)
        if manifest.schema_version != SCHEMA:
            raise StoreError(
                f"{path} has schema version {manifest.schema_version}, which is only read; write it as {SCHEMA} with: "
                f"teacher-dump copy {path} NEW-FOLDER"
            )
        return cls(path, manifest.rows.slot_tokens, after=manifest.rows)

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
        if "interchange" in self._arrays:
            _check_pair(rows)
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

    def end_origin(self, corpus: str, options: Json, taken: str | None = None) -> None:
        """Say where the rows since the last origin came from; what follows begins a new slot."""
        self._flush_slot()
        if slots := len(self._slots) - sum(origin.slots for origin in self._origins):
            self._origins.append(Origin(corpus=corpus, options=options, slots=slots, taken=taken))

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
        domains: Sequence[str] = (),
    ) -> RowsInfo:
        """Commit the rows: write what is left and, last, the manifest. The arguments are those of RowsInfo, Origin and Manifest."""
        self.end_origin(corpus, options)
        info = self.rows_info(
            copies=copies,
            bucket=bucket,
            objective=objective,
            task=task,
            pad_id=pad_id,
            tokenizer=tokenizer,
            building=building,
            domains=domains,
        )
        if self._before is None:
            self.publish(Manifest(schema_version=SCHEMA, rows=info, passes={}, made=made))
            return info
        old = read_manifest(self.path)
        whole = joined({f"{self.path}": old.rows, "what is added": info})
        self.publish(old.changed(made, whole, old.passes))
        return whole

    def rows_info(
        self,
        *,
        copies: int,
        bucket: int,
        objective: str,
        task: Task,
        pad_id: int,
        tokenizer: str,
        building: str,
        domains: Sequence[str] = (),
    ) -> RowsInfo:
        """Write what is left; all there is to say of the rows, whose origins have ended."""
        self._flush_part()
        if not self._parts:
            raise ValueError("expected at least one row, found none; is the corpus empty?")
        if bool(domains) != ("domain" in self._of_rows) or self._domains > len(domains):
            raise ValueError(f"domains: expected a name for each of the rows' {self._domains} domains, found {len(domains)}")
        rows, tokens, labelled = zip(*self._slots, strict=True)
        return RowsInfo(
            rows=sum(rows),
            tokens=sum(tokens),
            slots=len(rows),
            slot_tokens=self.slot_tokens,
            chunk_tokens=self._chunk_tokens,
            filled=Filled(rows=rows, tokens=tokens, labelled=labelled),
            copies=copies,
            bucket=bucket,
            objective=objective,
            task=task,
            domains=tuple(domains),
            splits=dict(self._splits),
            parts=tuple(self._parts),
            token_arrays=tuple(self._arrays.values()),
            slot_crcs={name: tuple(crcs) for name, crcs in self._crcs.items()},
            pad_id=pad_id,
            tokenizer=tokenizer,
            building=building,
            origins=tuple(self._origins),
        )

    def publish(self, manifest: Manifest) -> None:
        """Make the store what ``manifest`` says, and let other processes write."""
        sync_folder(self.path / "rows")
        hierarchy.write(self.path, manifest)
        layout.building(self.path).unlink(missing_ok=True)
        self.close()

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
        self._of_rows = {name: spec for name, spec in ROW_ARRAYS.items() if name in ("numbers", "label") or getattr(row, name) is not None}
        self._crcs |= {name: [] for name in (*self._of_rows, *self._arrays)}
        for name in self._of_rows:
            make_folder(layout.rows_array(self.path, name))
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
        if (row.domain is not None) != ("domain" in self._of_rows) or not 0 <= (row.domain or 0) < 1 << 31:
            raise ValueError(f"{_where(row)}: domain: expected a number from 0 on in all rows, or in none, found {row.domain}")
        if (row.draw is not None) != ("draw" in self._of_rows) or not 0 <= (row.draw or 0) < 1 << 31:
            raise ValueError(f"{_where(row)}: draw: expected a number from 0 on in all rows, or in none, found {row.draw}")
        if row.phrases is not None and not _ascend(row.phrases):
            raise ValueError(f"{_where(row)}: phrases: expected numbers from 1 on, each for one stretch of tokens, in their order")
        for start, end in row.spans:
            if not 0 <= start < end <= length:
                raise ValueError(f"{_where(row)}: span ({start}, {end}) does not lie in the row's {length} tokens")

    def _flush_slot(self) -> None:
        if not self._slot:
            return
        slot, rows = self._first_slot + len(self._slots), len(self._slot)
        for name, spec in self._arrays.items():
            values: NDArray[Any] = np.concatenate([getattr(row, name) for row in self._slot])
            path = layout.slot_file(layout.tokens(self.path, name), slot, dimensions=1)
            shard = Shard(spec, self.slot_tokens, self._filled, self._chunk_tokens)
            self._crcs[name].append(write_slot(path, values, shard).crc32c)
        for row in self._slot:
            self._splits.setdefault(row.split, 0)
        codes = {name: code for code, name in enumerate(self._splits)}
        of_rows: dict[str, NDArray[Any]] = {
            "numbers": _numbers(self._slot, codes),
            "label": np.array([np.nan if row.label is None else row.label for row in self._slot]),
            "domain": np.array([row.domain or 0 for row in self._slot], np.int32),
            "draw": np.array([row.draw or 0 for row in self._slot], np.int32),
        }
        for name, spec in self._of_rows.items():
            path = layout.slot_file(layout.rows_array(self.path, name), slot)
            self._crcs[name].append(write_slot(path, of_rows[name], Shard(spec, self.slot_tokens, rows)).crc32c)
        self._domains = max([self._domains, *(row.domain + 1 for row in self._slot if row.domain is not None)])
        for row in self._slot:
            spans = [{"start": start, "end": end} for start, end in row.spans]
            about = (row.split, row.copy, len(row.input_ids), row.label, row.source, row.record, row.part, spans)
            for name, value in zip(COLUMNS.names, about, strict=True):
                self._table[name].append(value)
        self._splits.update(row.split for row in self._slot)
        self._slots.append((rows, self._filled, sum(row.labelled for row in self._slot)))
        self._slot, self._filled = [], 0
        if len(self._table["split"]) >= PART_ROWS:
            self._flush_part()

    def _flush_part(self) -> None:
        rows = len(self._table["split"])
        if not rows:
            return
        path = layout.rows_part(self.path, self._first_part + len(self._parts))
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


def _ascend(phrases: NDArray[np.uint16]) -> bool:
    """Whether each number but 0 stands in one stretch and is the next one after that of the stretch before."""
    starts = phrases[np.flatnonzero(np.diff(phrases, prepend=0))]
    return np.array_equal(starts[starts > 0], np.arange(1, (starts > 0).sum() + 1))


def _check_pair(rows: Sequence[Row]) -> None:
    """Refuse a group that is no pair with a sound plan."""
    if len(rows) != 2 or any(row.draw is None for row in rows):
        raise ValueError(f"{_where(rows[0])}: expected rows with interchange in groups of two, each with a draw, found {len(rows)}")
    plan = np.concatenate([row.interchange for row in rows if row.interchange is not None])
    lengths, draws = np.array([len(row.input_ids) for row in rows]), np.array([row.draw for row in rows])
    if not sound(plan, lengths, draws):
        raise ValueError(f"{_where(rows[0])}: interchange: expected rows that name one another's tokens, and one draw, in a pair")


def _where(row: Row) -> str:
    return f"{row.source}, record {row.record}"


def _check_unchanged(path: Path, known: RowsInfo) -> None:
    """Refuse to add where another process has just done so: the caller has looked before it held the store."""
    if read_manifest(path).rows != known:
        raise StoreError(f"the rows of {path} have just been changed by another process; start again")
