"""What a trial of a sweep leaves behind: its run, how its process ended, and the row of the sweep's table that follows from both.

<output>/sweep.yaml            the sweep as it was last started; that the folder is a sweep's
<output>/recipes/<trial>.yaml  the recipe of a trial as resolved
<output>/trials/<trial>/       its run (student_train.output), without checkpoints once it is finished
<output>/logs/<trial>.log      what its processes said
<output>/claims/<trial>        locked as long as a process works on the trial
<output>/ended/<trial>.json    how its process ended, and in how many seconds; that it was pruned
<output>/study.id, study.log, proposed.json     what was proposed (student_train.study)
<output>/trials.json           a row for each trial, written anew whenever one ends
"""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from store import layout
from store.publish import make_folder, replace
from store.strict import Strict, parse
from student_train.output import CHECKPOINTS, RESULT, phase_folder, student_folder
from student_train.pruning import best, curve
from student_train.recipe import PhaseSpec, TrainRecipe
from student_train.sweep import Sweep, Trial
from student_train.weights import count_weights

SWEEP = "sweep.yaml"
TABLE = "trials.json"
_ERROR_LINES = 10


class Ending(Strict):
    """How the last process of a trial ended."""

    code: int
    """Its exit code; -n: signal n has killed it."""
    seconds: float
    """How long that process ran; an earlier one that was interrupted doesn't count."""
    device: str
    """``cpu`` or ``cuda:N``; empty where the sweep names no devices."""
    error: str
    """The last lines that it wrote, where it failed."""
    pruned: int | None = None
    """The optimiser step of the score for which its combination was given up; None where it wasn't."""


class Row(Strict):
    """A trial in the table."""

    trial: str
    parameters: dict[str, object]
    seed: int
    state: str
    """``finished``, ``failed``, ``pruned``, or ``open``: not begun, interrupted, or at work."""
    score: float | None
    """That of the sweep's metric, as measured; None where there is none (yet), or it is no number."""
    scores: dict[str, float | None]
    """All held-out scores of the phase that is scored."""
    start: str | None
    """Hash of the student's weights before its first phase."""
    student_parameters: int | None
    seconds: float | None
    device: str | None
    error: str | None
    pruned: int | None = None
    """Of a pruned trial: the optimiser step of the score for which its combination was given up."""
    best: float | None = None
    """Of a pruned trial: its best score until then; None of one that was not begun."""


def begin(sweep: Sweep) -> None:
    """Make the folder of ``sweep``; raises ValueError where it holds something else."""
    folder = sweep.output
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"output: expected a folder or nothing, found a file: {nearest}")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    of_a_beginning = {"claims", layout.temporary(folder / SWEEP).name}  # another worker may be here
    if SWEEP not in names and names - of_a_beginning:
        raise ValueError(f"output: {folder} holds something else than a sweep of student-train; give another folder")
    tree = sweep.model_dump(mode="json", exclude_none=True)
    with turn(sweep):
        replace(folder / SWEEP, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode())
    for name in ("recipes", "logs", "ended", "trials"):
        make_folder(folder / name)


def claim(sweep: Sweep, trial: Trial) -> int | None:
    """An open file that keeps ``trial`` for this process and those that inherit it, until all have closed it; None: it is taken."""
    handle = os.open(sweep.output / "claims" / trial.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def is_finished(trial: Trial) -> bool:
    """Whether all its phases have their results."""
    return all((phase_folder(trial.recipe, phase.name) / RESULT).is_file() for phase in trial.recipe.phases)


def drop_checkpoints(trial: Trial) -> None:
    """Free what a finished trial went on from: weights and both moments of its optimiser, several times."""
    for phase in trial.recipe.phases:
        shutil.rmtree(phase_folder(trial.recipe, phase.name) / CHECKPOINTS, ignore_errors=True)


def state(sweep: Sweep, trial: Trial) -> str:
    """``finished``, ``failed``, ``pruned`` or ``open``."""
    if is_finished(trial):
        return "finished"
    ending = read_ending(sweep, trial)
    if ending is None:
        return "open"
    return "pruned" if ending.pruned is not None else "failed" if ending.code else "open"


def score(sweep: Sweep, trial: Trial) -> float | None:
    """The held-out score of a finished trial by the sweep's metric; None where that is no number."""
    return _scores(trial).get(sweep.metric.removeprefix("-"))


def read_ending(sweep: Sweep, trial: Trial) -> Ending | None:
    """How its last process ended; None where none has, or a killed sweep couldn't tell."""
    file = _ending(sweep, trial)
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; remove it, and start the sweep again") from None
    return parse(Ending, tree, str(file))


def write_pruned(sweep: Sweep, trial: Trial, step: int) -> None:
    """Keep that a trial is not begun, since its combination was given up at ``step`` of another seed."""
    write_ending(sweep, trial, Ending(code=0, seconds=0.0, device="", error="", pruned=step))


def write_ending(sweep: Sweep, trial: Trial, ending: Ending) -> None:
    """Keep how its process ended."""
    replace(_ending(sweep, trial), ending.model_dump_json(indent=1).encode())


def forget_failures(sweep: Sweep, tried: Iterable[Trial]) -> None:
    """Let failed trials be tried again; those that another process works on are left alone."""
    for trial in tried:
        if (handle := claim(sweep, trial)) is not None:
            if state(sweep, trial) == "failed":
                _ending(sweep, trial).unlink()
            os.close(handle)


def last_lines(log: Path, begin: int) -> str:
    """The end of what was written to ``log`` after its first ``begin`` bytes: from the last message of an error, or a few lines."""
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode("utf-8", "replace").replace("\r", "\n").rstrip().split("\n")
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    return "\n".join(lines[errors[-1] :] if errors else lines[-_ERROR_LINES:])


def rows(sweep: Sweep, tried: Iterable[Trial]) -> list[Row]:
    """The table as it is now, in the order of the trials."""
    return [_row(sweep, trial) for trial in tried]


def write_table(sweep: Sweep, tried: Iterable[Trial]) -> None:
    """Write ``trials.json`` anew."""
    with turn(sweep):
        table = [row.model_dump(mode="json") for row in rows(sweep, tried)]
        replace(sweep.output / TABLE, (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode())


@contextmanager
def turn(sweep: Sweep) -> Iterator[None]:
    """Be the only process that writes files which several write; the others wait."""
    make_folder(sweep.output / "claims")
    with (sweep.output / "claims" / ".turn").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _row(sweep: Sweep, trial: Trial) -> Row:
    ending, now = read_ending(sweep, trial), state(sweep, trial)
    done, pruned = now == "finished", now == "pruned"
    return Row(
        trial=trial.name,
        parameters=dict(trial.parameters),
        seed=trial.seed,
        state=now,
        score=score(sweep, trial) if done else None,
        scores=_scores(trial) if done else {},
        start=_result(trial.recipe, _first(trial)).get("start") if done else None,
        student_parameters=count_weights(student_folder(trial.recipe, trial.scored.name)) if done else None,
        seconds=None if ending is None or not ending.seconds else ending.seconds,
        device=None if ending is None or not ending.seconds else ending.device,
        error=ending.error if now == "failed" and ending is not None else None,
        pruned=ending.pruned if pruned and ending is not None else None,
        best=best(curve(phase_folder(trial.recipe, trial.scored.name), sweep.metric), sweep.metric) if pruned else None,
    )


def _scores(trial: Trial) -> dict[str, float | None]:
    """Held-out scores of a finished trial; None where one is no number."""
    after = _result(trial.recipe, trial.scored).get("after", {})
    return {name: value if math.isfinite(value) else None for name, value in after.items()}


def _first(trial: Trial) -> PhaseSpec:
    """The phase that the scored student began with."""
    phase = trial.scored
    while phase.student.phase is not None:
        phase = trial.recipe.phase(phase.student.phase)
    return phase


def _result(recipe: TrainRecipe, phase: PhaseSpec) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((phase_folder(recipe, phase.name) / RESULT).read_text(encoding="utf-8"))
    return tree


def _ending(sweep: Sweep, trial: Trial) -> Path:
    return sweep.output / "ended" / f"{trial.name}.json"
