"""Tables as Parquet files that are there whole or not at all."""

import io
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from store.publish import replace


def write_parquet(file: Path, table: pa.Table) -> None:
    """``table`` at ``file``, in place of what was there; raises StoreError where that cannot be written."""
    written = io.BytesIO()
    parquet.write_table(table, written, compression="zstd")
    replace(file, written.getvalue())
