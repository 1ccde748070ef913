"""What a finished student answers to held-out rows, beside what its teacher answers: ``predictions.parquet`` in the folder of a phase.

It holds the task logits that the phase's metrics were computed from, so it is written where they read some and every row has its own:
not of words or of tokens' classes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from student_train.evaluate import HeldOut
from student_train.metrics import Columns
from student_train.parquet_file import write_parquet

PREDICTIONS = "predictions.parquet"
SCHEMA = pa.schema(
    [
        ("store", pa.string()),
        ("split", pa.string()),
        ("row", pa.int64()),  # number in the store
        ("label", pa.float64()),  # class number or score; null where the row has none
        ("student", pa.list_(pa.float32())),  # task logits
        ("teacher", pa.list_(pa.float32())),  # null where no metric compares with it
    ]
)


def write_predictions(folder: Path, held_out: Sequence[HeldOut], answers: Sequence[Columns]) -> None:
    """Write the file, or take an earlier one away where there is nothing to write."""
    tables = [
        _table(data, columns) for data, columns in zip(held_out, answers, strict=True) if len(columns.get("logits", ())) == len(data.rows)
    ]
    if not tables:
        (folder / PREDICTIONS).unlink(missing_ok=True)
        return
    write_parquet(folder / PREDICTIONS, pa.concat_tables(tables))


def _table(data: HeldOut, columns: Columns) -> pa.Table:
    rows = len(data.rows)
    labels = columns.get("labels", np.full(rows, np.nan))
    teacher = columns.get("teacher_logits")
    places = {place: name for place, name in enumerate(data.store.manifest.rows.splits)}
    return pa.table(
        {
            "store": [str(data.store.path)] * rows,
            "split": [places[place] for place in data.store.rows.at(data.rows).split.tolist()],
            "row": data.rows,
            "label": pa.array(labels, from_pandas=True),
            "student": columns["logits"].astype(np.float32).tolist(),
            "teacher": [None] * rows if teacher is None else teacher.astype(np.float32).tolist(),
        },
        schema=SCHEMA,
    )
