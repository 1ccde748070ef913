"""A sweep at work: all trials are checked, then each is trained in a process of its own, shared with other workers on the same folder."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from store.errors import MissingFeature, StoreError
from store.publish import replace
from store.strict import did_you_mean
from student_train.child import ends_with_parent
from student_train.needs import needs
from student_train.outline import Outline, score_names
from student_train.output import finished, recipe_yaml
from student_train.recipe import PhaseSpec
from student_train.run import check_features, check_options
from student_train.sweep import Sweep, Trial, combination
from student_train.trial import (
    Ending,
    Row,
    begin,
    claim,
    forget_failures,
    is_finished,
    is_over,
    last_lines,
    rows,
    write_ending,
    write_table,
)

POLL = 0.5
"""Seconds from one look at processes and claims to the next."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Work:
    """A trial whose process runs."""

    trial: Trial
    process: subprocess.Popen[bytes]
    device: str
    claim: int
    started: float
    log: Path
    log_begin: int
    """Bytes that earlier processes of the trial have written."""


def check_sweep(sweep: Sweep, tried: Sequence[Trial]) -> None:
    """Refuse what would only fail in the middle, in one message for all trials; what stores lack as the lines of one dump recipe.

    Raises:
        ValueError: a recipe that doesn't fit its data or models, a metric that isn't measured, a trial begun with other options.
        StoreError: features that stores lack.
    """
    for device in sweep.devices:
        if device != "cpu" and int(device.removeprefix("cuda:")) >= torch.cuda.device_count():
            raise ValueError(f"devices: expected cpu or one of {torch.cuda.device_count()} GPUs that torch sees, found {device}")
    problems: dict[str, list[str]] = {}
    outlines: list[Outline] = []
    firsts = [trial for trial in tried if trial.seed == sweep.seeds[0]]
    for trial in firsts:
        try:
            _check_metric(trial.scored, sweep.metric)
            outlines += check_options(trial.recipe, trial.recipe.phases)
        except (ValueError, StoreError) as error:
            problems.setdefault(str(error), []).append(combination(trial.parameters))
    if problems:
        raise ValueError("\n".join(f"{_several(where)}: {problem}" for problem, where in problems.items()))
    try:
        check_features(outlines)
    except MissingFeature as error:
        lines = needs([trial.recipe for trial in firsts])
        raise MissingFeature(f"{error}\n\nA dump with these lines serves all trials:\n{lines.rstrip()}") from None
    for trial in tried:
        for phase in trial.recipe.phases:
            finished(trial.recipe, phase)


def run_sweep(sweep: Sweep, tried: Sequence[Trial], *, retry: bool) -> list[Row]:
    """Train the trials, which were checked, that are neither finished nor at work elsewhere; until all are over, whoever trains them.

    Args:
        retry: Try those again that have failed.

    Raises:
        ValueError: this process is a rank of a launch, or the output folder holds something else.
    """
    if "RANK" in os.environ:
        raise ValueError("a sweep starts its trials by itself; start it once on each machine, without a launcher")
    begin(sweep)
    if retry:
        forget_failures(sweep, tried)
    done = sum(is_finished(trial) for trial in tried)
    _log.info("%d trials, of which %d are finished", len(tried), done)
    with _ended_by_sigterm():
        _work(sweep, tried)
    write_table(sweep, tried)
    return rows(sweep, tried)


def _work(sweep: Sweep, tried: Sequence[Trial]) -> None:
    devices, left = sweep.devices or ("",), list(tried)
    working: dict[int, _Work] = {}
    try:
        while True:
            for place, work in list(working.items()):
                if work.process.poll() is not None:
                    del working[place]
                    _end(sweep, tried, work)
            if len(working) < len(devices):
                left = [trial for trial in left if not is_over(sweep, trial)]
                if not left and not working:
                    return
                for place, device in enumerate(devices):
                    if place not in working and (started := _start_one(sweep, left, device)) is not None:
                        working[place] = started
            time.sleep(POLL)
    finally:
        for work in working.values():
            work.process.terminate()
        for work in working.values():
            work.process.wait()


def _start_one(sweep: Sweep, left: Sequence[Trial], device: str) -> _Work | None:
    """Start the first trial that nobody works on."""
    for trial in left:
        handle = claim(sweep, trial)
        if handle is None:
            continue
        if is_over(sweep, trial):  # another worker ended it just now
            os.close(handle)
            continue
        return _start(sweep, trial, device, handle)
    return None


def _start(sweep: Sweep, trial: Trial, device: str, handle: int) -> _Work:
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
    return _Work(trial, process, device, handle, time.monotonic(), log, log_begin)


def _end(sweep: Sweep, tried: Sequence[Trial], work: _Work) -> None:
    """Keep how a trial's process ended, and say so; where it was told to end, so is the sweep."""
    code = work.process.returncode
    if code in (-signal.SIGINT, 128 + signal.SIGINT):
        raise KeyboardInterrupt
    if code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        sys.exit(128 + signal.SIGTERM)
    seconds = time.monotonic() - work.started
    error = (last_lines(work.log, work.log_begin) or "it said nothing") if code else ""
    if code < 0:
        error = f"signal {-code} ({signal.Signals(-code).name}) has killed its process\n{error}".rstrip()
    write_ending(sweep, work.trial, Ending(code=code, seconds=round(seconds, 3), device=work.device, error=error))
    write_table(sweep, tried)
    os.close(work.claim)
    (row,) = rows(sweep, [work.trial])
    score = "is no number" if row.score is None else f"{row.score:.4f}"
    what = f"failed: {error.splitlines()[0]}" if code else f"{sweep.metric.removeprefix('-')} {score}"
    _log.info("trial %d of %d: %s: %s, %.0f s", tried.index(work.trial) + 1, len(tried), work.trial, what, seconds)


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


def _check_metric(phase: PhaseSpec, metric: str) -> None:
    """Raise ValueError where ``phase`` doesn't measure it."""
    if not phase.evaluate:
        raise ValueError(f"metric: phase {phase.name!r} measures nothing: give it evaluate and metrics")
    known = [f"{prefix}{name}" for prefix in score_names(phase).values() for name in ("loss", *phase.metrics)]
    if metric.removeprefix("-") not in known:
        raise ValueError(f"metric: phase {phase.name!r} measures no {metric!r}{did_you_mean(metric.removeprefix('-'), known)}")


def _several(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} other combinations"


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
