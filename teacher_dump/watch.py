"""What a run shows of itself: a progress bar, logs and events of each rank, figures for Prometheus, and word of a disk that stalls."""

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch
from pydantic import JsonValue
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from online.replica import Replica
from store.manifest import Provenance
from store.table import Ints, RowTable
from teacher_dump.journal import Journal, Regular
from teacher_dump.mfu import Arithmetic, arithmetic
from teacher_dump.progress import Answered, Bar
from teacher_dump.prometheus import Textfile
from teacher_dump.recipe import DumpRecipe
from teacher_dump.stopping import Stopping
from teacher_dump.teacher import TeacherPass
from teacher_dump.totals import Totals

TICK = 0.5
"""Seconds from one drawing of the bar to the next."""
LOOK = 2.0
"""Seconds from one look at the store's commit logs to the next."""
EXPORT = 10.0
"""Seconds from one writing of the Prometheus file to the next."""
REPORT = 60.0
"""Seconds from one progress event to the next."""
STALL = 60.0
"""Seconds after which a commit counts as stalled, and from one word about it to the next."""
LONG_WAIT = 1.0
"""Seconds of waiting for the disk that are worth an event."""

_LAUNCHERS = ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
"""What launchers say of a job."""

_log = logging.getLogger(__name__)
_log.setLevel(logging.INFO)
_log.propagate = False  # standard error has the bar


class Behind(Protocol):
    """What is on its way to the disk; teacher_dump.pipeline.Pipeline."""

    waiting: int
    limit: int
    waited: float
    committing: tuple[int, float] | None


class Watch:
    """The observation of one rank of a run; methods are cheap, and any thread may call them.

        with Watch(recipe, replica, writer.rows, made, stopping) as watch:
            watch.answering(teacher)

    Raises:
        ValueError: the folder of the recipe for logs or figures cannot be written, or a library is missing.
    """

    def __init__(self, recipe: DumpRecipe, replica: Replica, rows: RowTable, made: Provenance, stopping: Stopping) -> None:
        self._recipe, self._replica, self._rows, self._made, self._stopping = recipe, replica, rows, made, stopping
        self._totals = Totals()
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._stack = ExitStack()
        self._begun: float | None = None
        self._own: dict[int, Answered] = {}
        self._behind: Behind | None = None
        self._stalled, self._stop_told = 0.0, False
        self._arithmetic: Arithmetic | None = None
        self._bar: Bar | None = None
        self._textfile: Textfile | None = None
        if recipe.prometheus is not None:
            self._textfile = Textfile(recipe.prometheus, recipe.store, recipe.pass_name, replica.job_rank)
        self._journal = self._open_journal()

    @property
    def totals(self) -> Totals:
        """What this rank has done so far."""
        with self._lock:
            totals = replace(self._totals)
        totals.seconds = 0.0 if self._begun is None else time.monotonic() - self._begun
        if (behind := self._behind) is not None:
            totals.disk_wait, totals.queue_bytes, totals.queue_limit = behind.waited, behind.waiting, behind.limit
        if self._arithmetic is not None and totals.seconds:
            totals.mfu = totals.operations / (totals.seconds * self._arithmetic.peak)
        return totals

    def answering(self, teacher: TeacherPass) -> None:
        """That the teacher begins to answer: speed is counted from here on, and the bar appears."""
        if self._replica.leads or not teacher.alike:
            self._arithmetic = arithmetic(teacher, self._replica.size if teacher.alike else 1)
        gpu = torch.cuda.get_device_name(teacher.device) if teacher.device.type == "cuda" else None
        facts: dict[str, JsonValue] = {"device": str(teacher.device), "gpu": gpu, "threads": torch.get_num_threads()}
        facts |= {"batch_tokens": teacher.batch_tokens, "elements": teacher.loaded.weights.local_elements()}
        if self._replica.job_rank == 0:
            self._bar = Bar(self._recipe.store, self._recipe.pass_name, self._rows)
            facts |= {"committed_shards": len(self._bar.committed.shards), "shards": self._rows.info.slots}
        self.event("answering", facts)
        self._begun = time.monotonic()

    def follow(self, behind: Behind) -> None:
        """Look from now on at what is on its way to the disk."""
        self._behind = behind

    def answered(self, shard: int, members: Ints, padded_tokens: int) -> None:
        """That the teacher was run on the rows ``members`` of ``shard``, one batch of so many tokens with its padding."""
        tokens = int(self._rows.at(members).length.sum())
        operations = 0 if self._arithmetic is None else self._arithmetic.operations(self._rows, members)
        with self._lock:
            before = self._own.get(shard)
            self._own[shard] = Answered(len(members) + (before.rows if before else 0), tokens + (before.tokens if before else 0))
            self._totals.rows += len(members)
            self._totals.tokens += tokens
            self._totals.padded_tokens += padded_tokens
            self._totals.operations += operations
        if before is None:
            self.event("shard_begun", {"shard": shard})

    def committed(self, shard: int, size: int, seconds: float) -> None:
        """That files of ``size`` bytes hold ``shard`` now, and how long it took to write them."""
        with self._lock:
            self._totals.shards += 1
            self._totals.bytes += size
            if self._bar is None:  # otherwise the bar counts it until it is seen among those of all ranks
                self._own.pop(shard, None)
        self.event("shard_committed", {"shard": shard, "bytes": size, "seconds": round(seconds, 3)})

    def say(self, text: str) -> None:
        """A line above the bar, and in the log; only the first rank of the job says it aloud."""
        if self._replica.job_rank == 0:
            tqdm.write(text, file=sys.stderr)
        _log.info("%s", text)

    def warn(self, text: str) -> None:
        """The same, said aloud by every rank."""
        tqdm.write(f"rank {self._replica.job_rank}: {text}" if self._replica.job_size > 1 else text, file=sys.stderr)
        _log.warning("%s", text)

    def event(self, kind: str, facts: Mapping[str, JsonValue]) -> None:
        """A line of the event log."""
        self._journal.event(kind, facts)

    def _open_journal(self) -> Journal:
        recipe, rank = self._recipe, self._replica.job_rank
        folder = recipe.logs or beside(recipe.store) / recipe.pass_name
        regular = [Regular(REPORT, self._report)]
        if rank == 0:
            regular.append(Regular(LOOK, self._look))
        if self._textfile is not None:
            regular.append(Regular(EXPORT, self._export))
        try:
            return Journal(folder, rank, regular, self._not_written)
        except OSError as error:
            why = f"cannot write logs to {folder}: {error.strerror}; give another folder, as in logs=FOLDER"
            if recipe.logs is not None:
                raise ValueError(why) from None
            tqdm.write(f"no logs: {why}", file=sys.stderr)
            return Journal(None, rank, regular, self._not_written)

    def _not_written(self, why: str) -> None:
        tqdm.write(f"rank {self._replica.job_rank} cannot write what it observes: {why}", file=sys.stderr)

    def __enter__(self) -> Self:
        replica = self._replica
        self._journal.start(_log)
        world: dict[str, JsonValue] = {"ranks": replica.job_size, "replica": replica.number, "replica_rank": replica.rank}
        world |= {"replica_size": replica.size, "local_rank": replica.local_rank}
        launcher: dict[str, JsonValue] = {name: os.environ[name] for name in _LAUNCHERS if name in os.environ}
        recipe = self._recipe.model_dump(mode="json")
        self.event("start", {**self._made.model_dump(mode="json"), "recipe": recipe, "world": world, "launcher": launcher})
        _log.info("%s", " ".join(self._made.command))
        logging.captureWarnings(True)
        self._stack.callback(logging.captureWarnings, False)
        if replica.job_rank == 0 and sys.stderr.isatty():
            self._stack.enter_context(logging_redirect_tqdm())
        self._ticking = threading.Thread(target=self._tick, name="watch", daemon=True)
        self._ticking.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closing.set()
        self._ticking.join()
        self._tell_of_stop()
        if isinstance(error, Exception):
            self.event("error", {"type": type(error).__name__, "message": str(error)})
            _log.error("%s", "".join(traceback.format_exception(error)).rstrip())
        ended = "done" if error is None else "failed" if isinstance(error, Exception) else "stopped"
        totals = self.totals
        self.event("end", {"ended": ended, **totals.facts()})
        _log.info("%s: %s", ended, totals)
        self._journal.close()
        if self._bar is not None:
            self._show(last=True)
            self._bar.close()
        self._stack.close()

    def _tick(self) -> None:
        """What is told at once; nothing in here touches a disk, which may be what is to be told of."""
        waited = 0.0
        while not self._closing.wait(TICK):
            behind = self._behind
            if behind is not None:
                if behind.waited - waited > LONG_WAIT:
                    self.event("disk_wait", {"seconds": round(behind.waited - waited, 3)})
                waited = behind.waited
                self._tell_of_stall(behind.committing)
            self._tell_of_stop()
            self._show()

    def _tell_of_stall(self, committing: tuple[int, float] | None) -> None:
        if committing is None:
            self._stalled = 0.0
            return
        shard, since = committing
        stalled = time.monotonic() - since
        if stalled < self._stalled:
            self._stalled = 0.0
        if stalled >= self._stalled + STALL:
            self._stalled = stalled - stalled % STALL
            self.warn(f"the disk has not taken shard {shard} for {stalled:.0f} s ({self._recipe.store})")
            self.event("disk_stall", {"shard": shard, "seconds": round(stalled, 1), "path": str(self._recipe.store)})

    def _tell_of_stop(self) -> None:
        if self._stopping.asked and not self._stop_told:
            self._stop_told = True
            self.say("asked to stop: finishing the shards that can be finished in time")
            self.event("stop_asked", {})

    def _look(self) -> None:
        """Hear what everybody has committed."""
        if self._bar is not None:
            self._bar.committed.look()

    def _show(self, last: bool = False) -> None:
        if self._bar is None:
            return
        with self._lock:
            self._own = {shard: own for shard, own in self._own.items() if shard not in self._bar.committed.shards}
            under_way = list(self._own.values())
        self._bar.show(under_way, self.totals, last)

    def _report(self) -> None:
        if self._begun is not None and not self._closing.is_set():
            self.event("progress", self.totals.facts())
            _log.info("so far: %s", self.totals)

    def _export(self) -> None:
        if self._textfile is not None:
            job = None if self._bar is None else (len(self._bar.committed.shards), self._rows.info.slots)
            self._textfile.write(self.totals, job, running=not self._closing.is_set())


def beside(store: Path) -> Path:
    """The folder beside ``store`` where its runs log; inside it would be a stranger to readers."""
    path = store.absolute()
    return path.with_name(f"{path.name}.logs")
