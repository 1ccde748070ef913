"""A sweep at work: each trial is trained in a process of its own, shared with other workers on the same folder."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from store.publish import replace
from student_train.child import ends_with_parent
from student_train.database import opened
from student_train.output import recipe_yaml
from student_train.study import Combination, Study
from student_train.sweep import Sweep, Trial
from student_train.trial import (
    Ending,
    Row,
    begin,
    claim,
    drop_checkpoints,
    forget_failures,
    is_finished,
    last_lines,
    rows,
    state,
    write_ending,
    write_pruned,
    write_table,
)

POLL = 0.5
"""Seconds from one look at processes and claims to the next."""

_log = logging.getLogger(__name__)


@dataclass
class _Work:
    """A trial whose process runs."""

    combination: Combination
    trial: Trial
    process: subprocess.Popen[bytes]
    device: str
    claim: int
    started: float
    log: Path
    log_begin: int
    """Bytes that earlier processes of the trial have written."""
    pruned: int | None = None
    """The step for which it was told to end."""


def run_sweep(sweep: Sweep, *, retry: bool) -> list[Row]:
    """Train what was checked and is neither finished nor at work elsewhere, until all is over, whoever trains it.

    Args:
        retry: Try those again that have failed.

    Raises:
        ValueError: this process is a rank of a launch, the output folder holds something else, or the study's database fails.
    """
    if "RANK" in os.environ:
        raise ValueError("a sweep starts its trials by itself; start it once on each machine, without a launcher")
    begin(sweep)
    with opened(sweep) as storage:
        study = Study(sweep, storage)
        if retry:
            forget_failures(sweep, study.trials())
        study.reopen()
        tried = study.trials()
        _log.info("%d trials, of which %d are finished", _expected(sweep, tried), sum(is_finished(trial) for trial in tried))
        with _ended_by_sigterm():
            _work(sweep, study)
        write_table(sweep, study.trials())
        return rows(sweep, study.trials())


def _expected(sweep: Sweep, tried: list[Trial]) -> int:
    """How many trials there are, or are to be."""
    return max(len(tried), (sweep.trials or 0) * len(sweep.seeds))


def _work(sweep: Sweep, study: Study) -> None:
    devices = sweep.devices or ("",)
    working: dict[int, _Work] = {}
    try:
        while True:
            for place, work in list(working.items()):
                if work.process.poll() is not None:
                    del working[place]
                    _end(sweep, study, work)
                else:
                    _look(study, work)
            for place, device in enumerate(devices):
                if place not in working and (started := _start_one(sweep, study, device)) is not None:
                    working[place] = started
            if not working and not study.at_work():
                return
            time.sleep(POLL)
    finally:
        for work in working.values():
            work.process.terminate()
        for work in working.values():
            work.process.wait()


def _look(study: Study, work: _Work) -> None:
    """Show the pruner how a combination's first seed does; tell its process to end where it does too badly."""
    if work.pruned is None and work.trial is work.combination.trials[0] and (step := study.report(work.combination)) is not None:
        work.pruned = step
        work.process.terminate()


def _start_one(sweep: Sweep, study: Study, device: str) -> _Work | None:
    """Start the first trial that is open and nobody works on, of what is proposed already or of what comes next."""
    while True:
        study.settle()
        for combination in study.at_work():
            first = combination.trials[0]
            for trial in combination.trials:
                if sweep.pruner is not None and trial is not first and state(sweep, first) == "open":
                    break  # it may be given up
                if state(sweep, trial) != "open" or (handle := claim(sweep, trial)) is None:
                    continue
                if state(sweep, trial) == "open":
                    return _start(sweep, combination, trial, device, handle)
                os.close(handle)  # another worker ended it just now
        if study.propose() is None:
            return None


def _start(sweep: Sweep, combination: Combination, trial: Trial, device: str, handle: int) -> _Work:
    recipe, log = sweep.output / "recipes" / f"{trial.name}.yaml", sweep.output / "logs" / f"{trial.name}.log"
    replace(recipe, recipe_yaml(trial.recipe).encode())
    with log.open("ab") as stream:
        log_begin = stream.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "student_train.cli", "run", str(recipe)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=trial_environment(os.environ, device, sweep.threads),
            pass_fds=(handle,),  # so that the trial stays claimed until this process is gone, also where the sweep is killed
            preexec_fn=ends_with_parent(),
        )
    return _Work(combination, trial, process, device, handle, time.monotonic(), log, log_begin)


def _end(sweep: Sweep, study: Study, work: _Work) -> None:
    """Keep how a trial's process ended, and say so; where it was told to end, and not by the pruner, so is the sweep."""
    code, seconds, trial = work.process.returncode, time.monotonic() - work.started, work.trial
    pruned = None if is_finished(trial) else work.pruned  # or it was faster
    error = ""
    if pruned is None:
        if code in (-signal.SIGINT, 128 + signal.SIGINT):
            raise KeyboardInterrupt
        if code in (-signal.SIGTERM, 128 + signal.SIGTERM):
            sys.exit(128 + signal.SIGTERM)
        error = (last_lines(work.log, work.log_begin) or "it said nothing") if code else ""
        if code < 0:
            error = f"signal {-code} ({signal.Signals(-code).name}) has killed its process\n{error}".rstrip()
    write_ending(sweep, trial, Ending(code=code, seconds=round(seconds, 3), device=work.device, error=error, pruned=pruned))
    if is_finished(trial):
        drop_checkpoints(trial)
    if pruned is not None:
        for other in work.combination.trials[1:]:
            if state(sweep, other) == "open":
                write_pruned(sweep, other, pruned)
    tried = study.trials()
    write_table(sweep, tried)
    os.close(work.claim)
    (row,) = rows(sweep, [trial])
    metric = sweep.metric.removeprefix("-")
    score = "is no number" if row.score is None else f"{row.score:.4f}"
    what = f"failed: {error.splitlines()[0]}" if error else f"{metric} {score}"
    if pruned is not None:
        what = f"pruned at step {pruned}, {metric} {'no number' if row.best is None else f'{row.best:.4f}'} at best"
    number = [one.name for one in tried].index(trial.name) + 1
    _log.info("trial %d of %d: %s: %s, %.0f s", number, _expected(sweep, tried), trial, what, seconds)


def trial_environment(known: Mapping[str, str], device: str, threads: int | None) -> dict[str, str]:
    """That of a trial's process. GPUs are counted among those that this process sees."""
    changed = dict(known)
    if device == "cpu":
        changed["CUDA_VISIBLE_DEVICES"] = ""
    elif device:
        number = device.removeprefix("cuda:")
        visible = known.get("CUDA_VISIBLE_DEVICES")
        changed["CUDA_VISIBLE_DEVICES"] = number if visible is None else visible.split(",")[int(number)]
    if threads is not None:
        changed["OMP_NUM_THREADS"] = str(threads)
    return changed


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends this process like an exit with code 143, so that what it has started is ended first."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
