"""Runs as they lie on disk, for a report: finished ones, unfinished ones, and all trials of a sweep."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store.strict import did_you_mean, read_yaml
from student_train.journal import read_journal

LOWER_IS_BETTER = frozenset({"loss", "task_kl", "teacher_kl", "mse", "perplexity", "ece", "task_ece"})
"""Scores of which less is more, also where nobody says so with a minus."""


@dataclass(frozen=True)
class Phase:
    """One phase of a run, as far as it has come."""

    name: str
    folder: Path
    spec: Mapping[str, Any]
    """The phase of the resolved recipe, as plain data."""
    methods: tuple[str, ...]
    logs: tuple[Mapping[str, float], ...]
    """The lines of metrics.jsonl: ``step``, ``epoch``, and either training (``loss``, ``METHOD/TERM``, ``gradient/PART``, ...) or held-out
    scores (``eval_SCORE``)."""
    before: Mapping[str, float] | None
    """Held-out scores of the untrained student; None where the phase was not begun, or measures nothing."""
    result: Mapping[str, Any] | None
    """result.json; None where the phase isn't finished."""
    probe: Path | None
    """probe.parquet, where the phase has one."""
    predictions: Path | None
    """predictions.parquet, where the phase has one."""

    @property
    def after(self) -> Mapping[str, float]:
        """Held-out scores of its student; empty where it isn't finished."""
        return {} if self.result is None else self.result.get("after", {})

    @property
    def student(self) -> Path:
        """Where its student lies, once it is finished."""
        return self.folder / "student"


@dataclass(frozen=True)
class Run:
    """A run, or a trial of a sweep."""

    name: str
    folder: Path
    sweep: Path | None
    """The sweep that it is a trial of."""
    method: str
    """What it is compared as: the sweep's name for what it tries, or its recipe's methods."""
    parameters: Mapping[str, object]
    """What a sweep set, or learning rate and rows of a step of the last phase."""
    seed: int
    state: str
    """``finished``, ``failed``, ``pruned`` or ``open``."""
    error: str
    """Why a trial failed, or when it was pruned."""
    seconds: float | None
    """How long its last process ran, where a sweep has noted it."""
    phases: tuple[Phase, ...]
    scored: int
    """Which of the phases is scored."""
    identity: str
    """The same in runs that differ in their seed alone."""

    @property
    def phase(self) -> Phase | None:
        """The one that is scored; None of a trial that was not begun."""
        return self.phases[self.scored] if self.phases else None

    def score(self, metric: str) -> float | None:
        """A held-out score of the finished student."""
        return None if self.phase is None else self.phase.after.get(metric)


@dataclass(frozen=True, eq=False)
class Runs:
    """What a report is about; equal to itself alone, so that what takes long is worked out once for it."""

    all: tuple[Run, ...]
    metric: str
    """Held-out score that ranks them."""
    lower: bool
    """Whether less of it is better."""
    texts: bool = True
    """Whether the data's texts may be shown."""

    @property
    def finished(self) -> list[Run]:
        """Those with the score."""
        return [run for run in self.all if run.state == "finished" and run.score(self.metric) is not None]

    def better(self, one: float, other: float) -> bool:
        """Whether score ``one`` is better than ``other``."""
        return one < other if self.lower else one > other


def load(folders: Sequence[Path], metric: str | None = None, texts: bool = True) -> Runs:
    """The runs in ``folders``: output folders of ``student-train run`` and ``student-train sweep``.

    Args:
        metric: Held-out score that ranks them, with a leading minus where lower is better; by default that of the first sweep, or else the
            ``best`` or first of ``metrics`` of the first run.
        texts: Whether the data's texts may be shown.

    Raises:
        ValueError: a folder that is neither, a damaged file in one, or a metric that no finished run has measured.
    """
    found: list[Run] = []
    wanted = [metric] if metric else []
    for folder in dict.fromkeys(path.resolve() for path in folders):
        if (folder / "sweep.yaml").is_file():
            sweep = read_yaml(folder / "sweep.yaml")
            wanted.append(str(sweep.get("metric", "loss")))
            found += _trials(folder, sweep)
        elif (folder / "run.json").is_file():
            found.append(_run(folder))
        else:
            raise ValueError(f"expected the output folder of student-train run or sweep (with run.json or sweep.yaml), found {folder}")
    if not found:
        raise ValueError(f"no trial of {', '.join(str(folder) for folder in folders)} has ended yet: there is nothing to report")
    chosen = wanted[0] if wanted else _metric(found[0])
    name = chosen.removeprefix("-")
    measured = sorted({score for run in found if run.phase is not None for score in run.phase.after})
    if measured and name not in measured:
        raise ValueError(f"none of the runs has measured {name!r}{did_you_mean(name, measured)}; give --metric another one")
    lower = chosen.startswith("-") or name.rpartition("/")[2] in LOWER_IS_BETTER
    return Runs(tuple(found), name, lower, texts)


def _metric(run: Run) -> str:
    spec = {} if run.phase is None else run.phase.spec
    return str(spec.get("best") or next(iter(spec.get("metrics") or ()), "loss"))


def _trials(folder: Path, sweep: Mapping[str, Any]) -> list[Run]:
    """A sweep's trials in the order of its table."""
    file = folder / "trials.json"
    try:
        rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; the sweep's command writes it anew") from None
    try:
        return [_trial(folder, sweep, row) for row in rows]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: a trial in it has no {error}; the sweep's command writes it anew") from None


def _trial(folder: Path, sweep: Mapping[str, Any], row: Mapping[str, Any]) -> Run:
    own = folder / "trials" / row["trial"]
    recipe = read_yaml(own / "recipe.yaml") if (own / "recipe.yaml").is_file() else {}
    phases = _phases(own, recipe)
    names = [phase.name for phase in phases]
    scored = names.index(sweep["phase"]) if sweep.get("phase") in names else len(phases) - 1
    parameters = dict(row["parameters"])
    named = [key for key, tried in sweep.get("search", {}).items() if isinstance(tried, dict) and key in parameters]
    tells = [
        key
        for key in named
        if any("methods" in path for option in sweep["search"][key].values() if isinstance(option, dict) for path in option)
    ]
    label = str(parameters[tells[0]]) if tells else " + ".join(phases[scored].methods) if phases else "not begun"
    return Run(
        name=row["trial"],
        folder=own,
        sweep=folder,
        method=label,
        parameters=parameters,
        seed=int(row["seed"]),
        state=str(row["state"]),
        error=_said(row, str(sweep.get("metric", "loss")).removeprefix("-")),
        seconds=row.get("seconds"),
        phases=phases,
        scored=scored,
        identity=json.dumps([str(folder), parameters], sort_keys=True),
    )


def _said(row: Mapping[str, Any], metric: str) -> str:
    """Why a trial ended before its time; empty where it didn't."""
    if row.get("pruned") is None:
        return str(row.get("error") or "")
    best = "no number" if row.get("best") is None else f"{row['best']:.4f}"
    return f"pruned at step {row['pruned']}, {metric} {best} at best"


def _run(folder: Path) -> Run:
    recipe = read_yaml(folder / "recipe.yaml")
    phases = _phases(folder, recipe)
    if not phases:
        raise ValueError(f"{folder / 'recipe.yaml'} is damaged: expected phases; start the run again, which writes it anew")
    last = phases[-1]
    rate = last.spec.get("trainer", {}).get("learning_rate")
    alike = {key: value for key, value in recipe.items() if key not in ("seed", "output")}
    return Run(
        name=folder.name,
        folder=folder,
        sweep=None,
        method=" + ".join(last.methods),
        parameters={**({} if rate is None else {"learning_rate": rate}), "batch_rows": last.spec.get("batch_rows", 32)},
        seed=int(recipe.get("seed", 0)),
        state="finished" if all(phase.result is not None for phase in phases) else "open",
        error="",
        seconds=None,
        phases=phases,
        scored=len(phases) - 1,
        identity=json.dumps(alike, sort_keys=True, default=str),
    )


def _phases(folder: Path, recipe: Mapping[str, Any]) -> tuple[Phase, ...]:
    try:
        return tuple(_phase(folder / spec["name"], spec) for spec in recipe.get("phases", ()))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'recipe.yaml'} is damaged: a phase in it has no {error}; start the run again") from None


def _phase(folder: Path, spec: Mapping[str, Any]) -> Phase:
    start = _object(folder / "start.json")
    try:
        logs = read_journal(folder / "metrics.jsonl")
    except ValueError as error:
        raise ValueError(f"{folder / 'metrics.jsonl'} is damaged: {error}; remove {folder} to train the phase again") from None
    return Phase(
        name=spec["name"],
        folder=folder,
        spec=spec,
        methods=tuple(method["name"] for method in spec["methods"]),
        logs=tuple(logs),
        before=None if start is None else start.get("scores") or None,
        result=_object(folder / "result.json"),
        probe=_if_there(folder / "probe.parquet"),
        predictions=_if_there(folder / "predictions.parquet"),
    )


def _if_there(file: Path) -> Path | None:
    return file if file.is_file() else None


def _object(file: Path) -> Mapping[str, Any] | None:
    """The JSON object in ``file``; None where there is no such file."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; remove {file.parent} to train the phase again") from None
    if tree is not None and not isinstance(tree, dict):
        raise ValueError(f"{file} is damaged: expected an object; remove {file.parent} to train the phase again")
    return tree
