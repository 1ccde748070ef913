"""What a probe has measured, as one table: distances, and the loss and the held-out scores of their steps."""

import re
from pathlib import Path

import pyarrow as pa

from student_train.curves import JOURNAL
from student_train.journal import read_journal
from student_train.parquet_file import write_parquet

PROBE_JOURNAL = "probe.jsonl"
PROBE = "probe.parquet"

SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("distance", pa.string()),
        pa.field("student_layer", pa.int64()),
        pa.field("teacher_layer", pa.int64()),
        pa.field("temperature", pa.float64()),
        pa.field("value", pa.float64(), nullable=False),
    ]
)
"""``kind`` is ``distance``, ``loss`` (of training since the last log, as in metrics.jsonl) or ``score`` (held-out, named as there); the
four columns that follow ``name`` are those of distances."""

_NAME = re.compile(r"(?P<distance>[a-z_]+)(?:\.(?P<student>\d+)-(?P<teacher>\d+))?(?:\.T(?P<temperature>.+))?")
"""Of a Comparison."""


def probe_table(folder: Path) -> pa.Table:
    """What the probe of the phase in ``folder`` has measured so far; no rows where it has none."""
    logged: dict[int, dict[str, float]] = {}
    for entry in read_journal(folder / JOURNAL):
        logged.setdefault(int(entry["step"]), {}).update(entry)
    rows: list[dict[str, object]] = []
    for entry in read_journal(folder / PROBE_JOURNAL):
        step = int(entry["step"])
        rows += [{"step": step, "kind": "distance", "value": value, **_columns(name)} for name, value in entry.items() if name != "step"]
        for name, value in logged.get(step, {}).items():
            if name == "loss" or name.startswith("eval_"):
                rows.append({"step": step, "kind": "loss" if name == "loss" else "score", "name": name, "value": float(value)})
    return pa.Table.from_pylist(rows, SCHEMA)


def write_probe(folder: Path) -> None:
    """Put it at ``probe.parquet``; raises StoreError where that cannot be written."""
    write_parquet(folder / PROBE, probe_table(folder))


def _columns(name: str) -> dict[str, object]:
    found = _NAME.fullmatch(name)
    assert found is not None, name
    layers = {f"{side}_layer": None if found[side] is None else int(found[side]) for side in ("student", "teacher")}
    temperature = None if found["temperature"] is None else float(found["temperature"])
    return {"name": name, "distance": found["distance"], **layers, "temperature": temperature}
