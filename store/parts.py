"""The Parquet files of the row table, weighed before anything of them is decoded: a small one can ask for gigabytes."""

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from store.plain import open_plain, pieces
from store.publish import crc32c

PART_ROWS = 1 << 16
"""Rows of one file, at least; it ends with a slot."""

MOST_BYTES = 1 << 30
"""A column may need so much memory."""

_CODECS = frozenset({"UNCOMPRESSED", "SNAPPY"})
"""What row building writes."""

_EXPANDS = 64
"""Snappy makes no more of a byte; nor does it pay to repeat a span more often."""

_ROW_BYTES = 1 << 14
"""A row may weigh so much in a file: the longest of paths and a thousand spans."""

_TEXT_BYTES = 1 << 10
"""Names of split and source of a row, on average; a dictionary can repeat a long one a million times."""


def read_part(path: Path, rows: int, crc: int | None, schema: pa.Schema, columns: Sequence[str]) -> pa.Table:
    """``columns`` of a file with so many ``rows``, that ``crc`` (crc32c; None leaves its bytes unread) and that ``schema``.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not that file; the message says how it differs.
    """
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    with os.fdopen(open_plain(path), "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > rows * _ROW_BYTES + (1 << 20):
            raise ValueError(f"{rows} rows do not need {size} bytes")
        if crc is not None and (found := _crc32c(handle.fileno(), size)) != crc:
            raise ValueError(f"expected crc32c {crc}, found {found}")
        try:
            with pq.ParquetFile(handle, read_dictionary=texts) as file:
                _check_footer(file.metadata, file.schema_arrow, rows, schema, texts)
                table = file.read(list(columns))
        except (pa.ArrowException, MemoryError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk; those of the decoder have no number
            raise ValueError(f"it cannot be decoded ({str(error).strip()})") from None
    for name in columns:
        if name != "label" and table[name].null_count:
            raise ValueError(f"rows without a {name}")
    for name in texts:
        if name in columns and (letters := _decoded_bytes(table[name])) > min(rows * _TEXT_BYTES, MOST_BYTES):
            raise ValueError(f"{letters:,} bytes of {name} are too many for {rows} rows")
    return table.cast(pa.schema([schema.field(name) for name in columns]))


def _crc32c(handle: int, size: int) -> int:
    crc = 0
    for piece in pieces(handle, size):
        crc = crc32c(piece, crc)
    return crc


def _check_footer(footer: pq.FileMetaData, found: pa.Schema, rows: int, schema: pa.Schema, texts: Sequence[str]) -> None:
    """What the end of a file says about the rest."""
    coded = pa.dictionary(pa.int32(), pa.string())
    wanted = pa.schema([pa.field(field.name, coded) if field.name in texts else field for field in schema])
    if not found.equals(wanted):
        raise ValueError("it has other columns than a row table")
    if footer.num_rows != rows:
        raise ValueError(f"expected {rows} rows, found {footer.num_rows}")
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    if sum(group.num_rows for group in groups) != rows:
        raise ValueError("its groups of rows do not add up")
    for group in groups:
        for column in map(group.column, range(group.num_columns)):
            held, most = column.total_compressed_size, group.num_rows
            if column.path_in_schema.startswith("spans."):
                most = min(_EXPANDS * (group.num_rows + held), MOST_BYTES // 8)
            if column.compression not in _CODECS or column.num_values > most or column.total_uncompressed_size > _EXPANDS * held:
                raise ValueError(f"column {column.path_in_schema} asks for more memory than its {held} bytes can fill")


def _decoded_bytes(column: pa.ChunkedArray) -> int:
    """Bytes of a dictionary-coded column of texts once every text is written out."""
    total = 0
    for chunk in column.chunks:
        lengths = pc.binary_length(chunk.dictionary).cast(pa.int64())
        total += pc.sum(lengths.take(chunk.indices)).as_py() or 0
    return total
