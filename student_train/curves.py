"""The curves of a run as one table: what metrics.jsonl holds, for whoever reads Parquet."""

from pathlib import Path

import pyarrow as pa

from student_train.journal import read_journal
from student_train.parquet_file import write_parquet

JOURNAL = "metrics.jsonl"
CURVES = "metrics.parquet"

SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("epoch", pa.float64()),
        pa.field("name", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)
"""One row for each number of each log, in their order."""


def curves(folder: Path) -> pa.Table:
    """The curves of the phase in ``folder`` as far as they go; no rows where it has none yet."""
    rows = [
        {"step": int(entry["step"]), "epoch": entry.get("epoch"), "name": name, "value": float(value)}
        for entry in read_journal(folder / JOURNAL)
        for name, value in entry.items()
        if name not in ("step", "epoch")
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


def write_curves(folder: Path) -> None:
    """Put them at ``metrics.parquet`` beside metrics.jsonl; raises StoreError where that cannot be written."""
    write_parquet(folder / CURVES, curves(folder))
