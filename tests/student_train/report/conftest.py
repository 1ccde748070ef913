"""Run folders and sweeps written by hand, as student-train leaves them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import save_file

WriteRun = Callable[..., Path]


def _run(
    folder: Path,
    *,
    seed: int = 0,
    methods: Sequence[str] = ("kd",),
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
    logs: Sequence[Mapping[str, float]] = (),
    start: str = "aaaabbbbcccc",
    answers: Mapping[str, object] | None = None,
) -> Path:
    """A run of one phase ``only``, finished where ``after`` is given, with a student of 2 x 3 + 4 numbers."""
    phase = folder / "only"
    phase.mkdir(parents=True)
    spec = {"name": "only", "methods": [{"name": name} for name in methods], "metrics": ["accuracy"], "batch_rows": 8}
    recipe = {"output": str(folder), "seed": seed, "phases": [spec]}
    (folder / "run.json").write_text("{}")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if before is not None:
        (phase / "start.json").write_text(json.dumps({"identity": {}, "scores": before}))
    (phase / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs))
    if after is not None:
        made = {"versions": {"torch": "2.0"}}
        result = {"start": start, "student": "s", "before": before or {}, "after": after, "steps": 4, "made": made}
        (phase / "result.json").write_text(json.dumps(result))
        (phase / "student").mkdir()
        weights = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)}
        save_file(weights, phase / "student" / "model.safetensors")
    if answers is not None:
        columns = {"store": ["no such store"], "split": ["dev"], "teacher": [None], **answers}
        rows = len(columns["row"])
        table = {name: list(column) * rows if len(column) == 1 else list(column) for name, column in columns.items()}
        pq.write_table(pa.table(table), phase / "predictions.parquet")
    return folder


@pytest.fixture(scope="session")
def write_run() -> WriteRun:
    """``write_run(folder, seed=0, methods=["kd"], before={...}, after={...}, logs=[...], answers={...})``."""
    return _run


@pytest.fixture(scope="session")
def write_sweep() -> Callable[..., Path]:
    """``write_sweep(folder, {"kd": [0.8, 0.9], "pkd": [...]})``: a trial for each score, the seeds counted from 0; None: not finished."""

    def write(folder: Path, scores: Mapping[str, Sequence[float | None]], metric: str = "accuracy", **rest: Mapping[str, object]) -> Path:
        rows = []
        for method, of_seeds in scores.items():
            for seed, score in enumerate(of_seeds):
                name = f"method={method}-seed={seed}"
                after = None if score is None else {"accuracy": score, "agreement": 0.5}
                answers = rest.get("answers", {}).get(name)
                _run(folder / "trials" / name, seed=seed, methods=[method], before={"accuracy": 0.5}, after=after, answers=answers)  # type: ignore[arg-type]
                state = "open" if score is None else "finished"
                rows.append(
                    {"trial": name, "parameters": {"method": method}, "seed": seed, "state": state, "score": score, "seconds": 60.0 + seed}
                )
        search = {"method": {method: {"phases.0.methods": [{"name": method}]} for method in scores}}
        (folder / "sweep.yaml").write_text(yaml.safe_dump({"output": str(folder), "search": search, "metric": metric}))
        (folder / "trials.json").write_text(json.dumps(rows))
        return folder

    return write
