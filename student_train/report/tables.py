"""What a report is about as Parquet, for people who draw their own pictures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from student_train.report.comparisons import compare
from student_train.report.gkd_distances import coefficients
from student_train.report.runs import Phase, Run, Runs
from student_train.weights import count_weights, weight_bytes

_INTERVAL = pa.struct([("low", pa.float64()), ("high", pa.float64())])

SCHEMAS: dict[str, pa.Schema] = {
    "runs": pa.schema(
        {
            "run": pa.string(),
            "sweep": pa.string(),  # null outside of sweeps
            "method": pa.string(),
            "parameters": pa.string(),  # JSON
            "seed": pa.int64(),
            "state": pa.string(),
            "error": pa.string(),
            "score": pa.float64(),  # of the metric that ranks
            "seconds": pa.float64(),  # of the last process of a sweep's trial
            "training_seconds": pa.float64(),  # of the phase that is scored, as the rest of its cost
            "memory": pa.int64(),
            "gpu_memory": pa.int64(),
            "feature_bytes": pa.float64(),  # read for each training row
            "student_parameters": pa.int64(),
            "student_bytes": pa.int64(),
            "start": pa.string(),
        }
    ),
    "scores": pa.schema({"run": pa.string(), "phase": pa.string(), "name": pa.string(), "before": pa.float64(), "after": pa.float64()}),
    "comparisons": pa.schema(
        {
            "one": pa.string(),
            "other": pa.string(),
            "seeds": pa.int64(),
            "difference": pa.float64(),
            "p": pa.float64(),
            "corrected": pa.float64(),  # Holm
            "over_seeds": _INTERVAL,
            "over_rows": _INTERVAL,
            "rows": pa.int64(),
            "resolved": pa.bool_(),
        }
    ),
    "curves": pa.schema({"run": pa.string(), "phase": pa.string(), "step": pa.int64(), "name": pa.string(), "value": pa.float64()}),
    "correlations": pa.schema(
        {
            "run": pa.string(),
            "phase": pa.string(),
            "distance": pa.string(),  # as the probe names it
            "with": pa.string(),  # training loss, or held-out SCORE
            "checkpoints": pa.int64(),
            "spearman": pa.float64(),  # null: fewer than four checkpoints, or one of both never changed
            "pearson": pa.float64(),
        }
    ),
}
"""Name of the file, without its ending -> its columns."""


def tables(runs: Runs) -> dict[str, pa.Table]:
    """Each of SCHEMAS, filled."""
    phases = [(run, phase) for run in runs.all for phase in run.phases]
    lines: dict[str, Sequence[Mapping[str, Any]]] = {
        "runs": [_run(run, runs.metric) for run in runs.all],
        "scores": [line for run, phase in phases for line in _scores(run, phase)],
        "comparisons": [_comparison(asdict(one) | {"resolved": one.resolved}) for one in compare(runs)],
        "curves": [line for run, phase in phases for line in _curves(run, phase)],
        "correlations": coefficients(runs),
    }
    return {name: pa.Table.from_pylist(list(found), schema=SCHEMAS[name]) for name, found in lines.items()}


def _run(run: Run, metric: str) -> dict[str, Any]:
    student = run.phase.student if run.phase is not None and run.phase.result is not None else None
    begun = run.phases[0].result if run.phases else None
    cost = {} if run.phase is None or run.phase.result is None else run.phase.result.get("cost", {})
    return {
        "run": run.name,
        "sweep": None if run.sweep is None else run.sweep.name,
        "method": run.method,
        "parameters": json.dumps(run.parameters, default=str),
        "seed": run.seed,
        "state": run.state,
        "error": run.error or None,
        "score": run.score(metric),
        "seconds": run.seconds,
        "training_seconds": cost.get("seconds"),
        **{name: cost.get(name) for name in ("memory", "gpu_memory", "feature_bytes")},
        "student_parameters": None if student is None else count_weights(student),
        "student_bytes": None if student is None else weight_bytes(student),
        "start": None if begun is None else begun.get("start"),
    }


def _scores(run: Run, phase: Phase) -> list[dict[str, Any]]:
    before = phase.before or {}
    names = dict.fromkeys([*before, *phase.after])
    return [
        {"run": run.name, "phase": phase.name, "name": name, "before": before.get(name), "after": phase.after.get(name)} for name in names
    ]


def _comparison(fields: dict[str, Any]) -> dict[str, Any]:
    for name in ("over_seeds", "over_rows"):
        if fields[name] is not None:
            fields[name] = dict(zip(("low", "high"), fields[name], strict=True))
    return fields


def _curves(run: Run, phase: Phase) -> list[dict[str, Any]]:
    return [
        {"run": run.name, "phase": phase.name, "step": int(log["step"]), "name": name, "value": float(value)}
        for log in phase.logs
        for name, value in log.items()
        if name not in ("step", "epoch") and isinstance(value, int | float)
    ]
