"""Start the ranks of a job on this machine, through torch's own launcher, and say as one what they say when it goes wrong."""

import contextlib
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from teacher_dump.last_words import OURS, LastWords, RanksFailed
from teacher_dump.stopping import EXIT, Stopped

MARGIN = 15.0
"""Seconds that ranks have after their grace to end, until they are killed."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""What torch's launcher takes and hands on to the ranks."""


def launch(ranks: int, program: Sequence[str], grace: float) -> None:
    """Run Python with the arguments ``program`` as so many ranks of one job, until all are done.

    Cores are divided between the ranks, unless OMP_NUM_THREADS says how many threads each has.

    Raises:
        ValueError: this process is a rank of a job itself.
        RanksFailed: a rank was killed, or ended with an exit code.
        Stopped, KeyboardInterrupt: a signal told this process to end, and all ranks have ended.
    """
    if "RANK" in os.environ:
        raise ValueError("--nproc starts ranks by itself, but this process is a rank of another launcher already; leave --nproc away")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(int(grace + MARGIN))
    with tempfile.TemporaryDirectory(prefix="teacher-dump-") as folder, _handlers_kept(), _quiet():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=f"{OURS}{uuid.uuid4()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # any free port
            local_addr="localhost",
            max_restarts=0,  # what is left is the next run's
            logs_specs=DefaultLogsSpecs(folder),
        )
        try:
            elastic_launch(config, sys.executable)(*program)
        except ChildFailedError as failed:
            raise _told(failed.failures) from None
        except SignalException as ended:
            if ended.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise Stopped from None


def _told(failures: Mapping[int, ProcessFailure]) -> RanksFailed:
    """One message for what has become of the ranks, without what only followed from something else."""
    words = {rank: _last_words(failure) for rank, failure in failures.items()}
    first = [rank for rank in sorted(words) if not words[rank].follows] or sorted(words)
    said: dict[str, list[int]] = {}
    for rank in first:
        said.setdefault(words[rank].text, []).append(rank)
    alike = len(said) == 1 and len(first) == len(failures)
    text = "\n".join(each if alike else f"{_named(ranks)}: {each}" for each, ranks in said.items())
    return RanksFailed(text, words[first[0]].code)


def _last_words(failure: ProcessFailure) -> LastWords:
    """Why a rank has ended. torch sends SIGTERM to all others once one has, also to those that were ending by themselves."""
    if words := LastWords.read(failure.error_file_data):
        return words
    if failure.exitcode == -signal.SIGTERM:
        return LastWords(str(Stopped()), EXIT, follows=True)
    if failure.exitcode < 0:
        memory = ", as the system does when memory is full" if failure.exitcode == -signal.SIGKILL else ""
        how, code = f"was killed by {failure.signal_name()}{memory}", 128 - failure.exitcode
    else:
        how, code = f"ended with exit code {failure.exitcode}", failure.exitcode
    return LastWords(f"error: process {failure.pid} {how}; what is committed is kept. The same command goes on where this one was.", code)


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Put the signal handlers back that torch's launcher replaces."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave to this file what torch's launcher would log about ranks that end."""
    log, silence = logging.getLogger("torch.distributed.elastic"), logging.NullHandler()
    log.addHandler(silence)
    propagate, log.propagate = log.propagate, False
    try:
        yield
    finally:
        log.removeHandler(silence)
        log.propagate = propagate
