"""The corpus file that `teacher-dump generate` makes, and the parts that it is made of until it is whole.

Parts lie in a folder beside it. Each is there as a whole or not at all, and says like the file itself what it is made of.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from teacher_dump.augmented_file import key, whole

COLUMNS = {"prompt": pa.string(), "response": pa.string(), "ended": pa.bool_(), "original": pa.int64(), "sample": pa.int32()}


def write_part(path: Path, rows: Iterable[Mapping[str, object]], made: Mapping[str, Any]) -> None:
    """Write the part ``path``, and give it its name when it is whole.

    Raises:
        StoreBusy: another process writes it.
        OSError: the disk is full, or there are no rights.
    """
    with whole(path) as file:
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=_schema(made)), file, compression="zstd")


def join(parts: Sequence[Path], file: BinaryIO, made: Mapping[str, Any]) -> None:
    """Write the rows of ``parts``, one after the other, to ``file``; a row group for each part."""
    with pq.ParquetWriter(file, _schema(made), compression="zstd") as writer:
        for part in parts:
            writer.write_table(pq.read_table(part).replace_schema_metadata(_schema(made).metadata))


def _schema(made: Mapping[str, Any]) -> pa.Schema:
    return pa.schema(list(COLUMNS.items()), metadata={key("generate"): json.dumps(made, sort_keys=True).encode()})
