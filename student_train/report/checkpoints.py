"""What a phase's probe has recorded, beside the training loss and the held-out scores at the same steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow
from pyarrow import parquet

from student_train.report.runs import Phase, Run, Runs

COLUMNS = ("step", "kind", "name", "distance", "student_layer", "teacher_layer", "temperature", "value")
Series = Mapping[int, float]
"""Step -> value."""


@dataclass(frozen=True)
class Distance:
    """What is between teacher and student, as the probe names it."""

    name: str
    distance: str
    """``hidden``, ``hidden_relation``, ``soft`` ...: the same at every layer and temperature."""
    student_layer: int | None
    teacher_layer: int | None
    temperature: float | None


@dataclass(frozen=True)
class Checkpoints:
    """One phase of one run, at the steps that its probe looked at."""

    run: Run
    phase: Phase
    distances: Mapping[Distance, Series]
    loss: Series
    """The training loss since the log before."""
    scores: Mapping[str, Series]
    """Held-out scores by name, without ``eval_``; those of the untrained student at step 0."""

    def held_out(self, metric: str) -> str | None:
        """The name of the held-out score to hold distances against: a perplexity, or else ``metric``, or else the held-out loss."""
        perplexities = [name for name in self.scores if name.rpartition("/")[2] == "perplexity"]
        return next((name for name in (*perplexities, metric, "loss") if name in self.scores), None)


def probed(runs: Runs) -> list[Checkpoints]:
    """Every phase with a probe, in the order of the runs; raises ValueError where one is damaged."""
    return [_read(run, phase) for run in runs.all for phase in run.phases if phase.probe is not None]


def paired(one: Series, other: Series) -> tuple[list[float], list[float]]:
    """The values of both at the steps where both are numbers, in the order of the steps."""
    steps = sorted(step for step in one.keys() & other.keys() if math.isfinite(one[step]) and math.isfinite(other[step]))
    return [one[step] for step in steps], [other[step] for step in steps]


def _read(run: Run, phase: Phase) -> Checkpoints:
    distances: dict[Distance, dict[int, float]] = {}
    loss: dict[int, float] = {}
    scores: dict[str, dict[int, float]] = {name: {0: value} for name, value in (phase.before or {}).items()}
    for row in _rows(phase):
        step, value = row["step"], math.nan if row["value"] is None else row["value"]
        if row["kind"] == "distance":
            distance = Distance(row["name"], row["distance"], row["student_layer"], row["teacher_layer"], row["temperature"])
            distances.setdefault(distance, {})[step] = value
        elif row["kind"] == "loss" and row["name"] == "loss":
            loss[step] = value
        elif row["kind"] == "score":
            scores.setdefault(row["name"].removeprefix("eval_"), {})[step] = value
    return Checkpoints(run, phase, distances, loss, scores)


def _rows(phase: Phase) -> list[dict[str, Any]]:
    assert phase.probe is not None
    mend = f"remove {phase.folder} to train the phase again"
    try:
        table = parquet.read_table(phase.probe)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{phase.probe} is damaged: {error}; {mend}") from None
    if lacking := [name for name in COLUMNS if name not in table.column_names]:
        raise ValueError(f"{phase.probe} is no probe: it lacks the columns {', '.join(lacking)}; {mend}")
    rows: list[dict[str, Any]] = table.select(list(COLUMNS)).to_pylist()
    return rows
