"""The corpus file that `teacher-dump augment` makes: Parquet with the columns of the records, and which record a copy is of.

What it is made of stands in its metadata, by content. It has its name when it is whole; until then a file beside it, by rule, holds
what there is, and the next try overwrites that.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from online.augment import Copy
from online.corpus import SourceSpec, column_names, list_files, read_records
from store import layout
from store.errors import FingerprintMismatch, StoreBusy
from store.plain import open_plain
from store.publish import make_folder, sync_folder

ADDED = {"original": pa.int64(), "copy": pa.int32()}
"""Columns beside those of the records: the number of the record in the corpus, from 0; 0 for the record itself, its copies from 1."""

_BLOCK = 1024
_GROUP_ROWS, _GROUP_LETTERS = 1 << 15, 1 << 23
"""A row group is written when it has so many rows, or so many letters in its text columns."""


def key(command: str) -> bytes:
    """Where a file says what ``command`` has made it of."""
    return f"teachercache.{command}".encode()


@dataclass(frozen=True)
class Survey:
    """What a corpus is, from reading it once."""

    records: int
    fingerprint: str
    """SHA-256 of all columns, as that of rows."""
    schema: pa.Schema
    """Its columns in their order; whole numbers are int64, others float64."""


def survey(sources: Sequence[SourceSpec], columns: Sequence[str], output: Path) -> Survey:
    """Read a corpus once.

    Raises:
        ValueError: it cannot be read, lacks one of the text ``columns``, has one of those that are added, has values of several types
            in a column, or holds the file ``output`` that is to be made of it.
    """
    for source in sources:
        for file, _ in list_files(source):
            if file.absolute() == output.absolute():
                raise ValueError(f"{output} is among the files that it is to be made of; give another output")
    names = column_names(sources)
    for name in ADDED.keys() & set(names):
        raise ValueError(f"the corpus has a column {name!r}, which augmented records have already; rename it")
    next(read_records(sources, columns), None)  # offers the nearest name for one that is not there
    digest, number = hashlib.sha256(), 0
    records = read_records(sources, names, digest=digest.update)
    types = {name: pa.null() for name in names}
    while block := [record.values for record in islice(records, _BLOCK)]:
        for name in names:
            types[name] = _common_type(name, types[name], [values[name] for values in block], number)
        number += len(block)
    if not number:
        raise ValueError(f"no records in {', '.join(file for source in sources for file in source.files)}")
    return Survey(number, digest.hexdigest(), pa.schema(list(types.items())))


def made_before(path: Path, made: Mapping[str, Any], command: str = "augment") -> int | None:
    """Records of the file at ``path`` if ``command`` made it of the same; None where there is none.

    Raises:
        FingerprintMismatch: it is made of something else; the message names the field.
        ValueError: it is no such file.
    """
    if not path.exists():
        return None
    try:
        found = pq.read_metadata(path)
    except (pa.ArrowException, OSError):
        found = None
    text = None if found is None else (found.metadata or {}).get(key(command))
    if text is None:
        raise ValueError(f"{path} is no file that `teacher-dump {command}` made; give another output, or remove it")
    known = json.loads(text)
    for field, expected in made.items():
        if known.get(field) != expected:
            raise FingerprintMismatch(
                f"{path} was made with another {field}: expected {known.get(field)} as it says, found {expected}; give another file, as in "
                f"`teacher-dump {command} RECIPE output={path.with_stem(path.stem + '-2')}`, or remove it"
            )
    return int(found.num_rows)


def write(path: Path, records: Iterable[Copy], schema: pa.Schema, made: Mapping[str, Any], columns: Sequence[str]) -> int:
    """Write a new file and give it its name when it is whole; the records in it.

    Args:
        schema: Of the values of records.
        made: What it is made of, as :func:`made_before` compares it.
        columns: The text columns, whose letters decide where row groups end.

    Raises:
        StoreBusy: another process writes it.
        OSError: the disk is full, or there are no rights.
    """
    schema = pa.schema([*schema, *ADDED.items()], metadata={key("augment"): json.dumps(made, sort_keys=True).encode()})
    written = 0
    with whole(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for rows in _groups(records, columns):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            written += len(rows)
    return written


def _groups(records: Iterable[Copy], columns: Sequence[str]) -> Iterator[list[dict[str, object]]]:
    """The rows of one row group after the other."""
    rows: list[dict[str, object]] = []
    letters = 0
    for record in records:
        rows.append({**record.values, "original": record.original, "copy": record.copy})
        letters += sum(len(str(record.values[name])) for name in columns)
        if len(rows) >= _GROUP_ROWS or letters >= _GROUP_LETTERS:
            yield rows
            rows, letters = [], 0
    if rows:
        yield rows


def _common_type(name: str, before: pa.DataType, values: list[object], number: int) -> pa.DataType:
    """The type of a column so far, with ``values`` of records from ``number`` on."""
    try:
        parts = [pa.schema([(name, kind)]) for kind in (before, pa.array(values).type)]
        return pa.unify_schemas(parts, promote_options="permissive").field(0).type
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(
            f"column {name!r} has values of several types, in records {number} to {number + len(values) - 1}: {error}"
        ) from None


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A new file that is given the name ``path`` in the end, and is gone where that is not reached."""
    make_folder(path.absolute().parent)
    temporary = layout.temporary(path)
    with os.fdopen(open_plain(temporary, os.O_RDWR | os.O_CREAT), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(file.fileno()), temporary.stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise StoreBusy(f"another process is writing {path}; wait for it to end, or stop it, and start again")
        try:
            file.truncate()
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.absolute().parent)
