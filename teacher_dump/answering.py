"""The loop of a dump: claim a shard, answer its batches, hand them to the disk; in step with the other ranks of the replica.

Ranks that hold a teacher together must run it equally often. Before every forward pass they say how they stand, and one that has
no batch of its own answers the shortest row there is. Under tensor parallelism all ranks answer the batches of the first.
"""

import time
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from online.batch import Batch
from online.collate import collate
from online.ranks import RankLost, talking
from online.replica import Replica
from store.errors import StoreError
from store.reader import Store
from store.table import Ints
from teacher_dump.batches import whole
from teacher_dump.out_of_memory import OutOfMemory
from teacher_dump.pipeline import Pipeline
from teacher_dump.stopping import Stopping
from teacher_dump.teacher import Origins, TeacherPass
from teacher_dump.watch import Watch
from teacher_dump.work import Item, Work

WAIT = 0.5
"""Seconds from one look to the next at what other processes have committed."""

MENDED = (ValueError, StoreError, OSError)
"""Errors that a user can mend, and that leave a rank able to tell the others."""


class Stand(IntEnum):
    """How a rank stands; a replica stands as that rank of it that stands highest."""

    DONE = 0
    WAITING = 1
    """Others work on all shards that are left."""
    STOPPED = 2
    """Was told to stop, and has finished its shard."""
    WORKING = 3
    OVERDUE = 4
    """Was told to stop, and has no time left."""
    FAILED = 5


class Output(NamedTuple):
    """Where the answers of a rank come from and go to."""

    work: Work
    pipeline: Pipeline


class Answering:
    """One rank's part in a pass.

    Args:
        output: None on ranks that only help the first of their replica.
    """

    def __init__(
        self, teacher: TeacherPass, store: Store, replica: Replica, output: Output | None, watch: Watch, stopping: Stopping
    ) -> None:
        self._teacher, self._store, self._replica = teacher, store, replica
        self._output, self._watch, self._stopping = output, watch, stopping
        self._item: Item | None = None
        self._batch: Batch | None = None
        self._failure: Exception | None = None
        self._idle = False

    def run(self) -> None:
        """Answer and commit pending shards until none is left, or until this job is told to stop.

        Raises:
            ValueError, StoreError, OSError: an answer is not finite, memory or the disk is full, or another rank of the replica failed.
        """
        while (stand := self._agreed(self._own_stand())) in (Stand.WORKING, Stand.WAITING):
            if stand is Stand.WAITING:
                time.sleep(WAIT)
            else:
                self._answer()
        if self._failure is not None:
            raise self._failure
        if self._output is not None:
            if self._output.work.shard is not None:
                self._output.pipeline.drop(self._output.work.shard)
            self._output.pipeline.drain()
        if stand in (Stand.STOPPED, Stand.OVERDUE):
            self._stopping.ask()  # it may have been another rank that was told
        if stand is Stand.FAILED:
            raise RankLost("another rank that holds the teacher with this one has failed; what is committed is kept, its message says why")

    def _own_stand(self) -> Stand:
        """Get the next batch ready and say how this rank stands."""
        self._item = self._batch = None
        if self._output is None:
            return Stand.DONE
        if self._failure is not None:
            return Stand.FAILED
        if self._stopping.overdue:
            return Stand.OVERDUE
        work, pipeline = self._output
        try:
            pipeline.check()
            self._item = work.next(claiming=not self._stopping.asked)
            if self._item is not None:
                self._batch = collate(self._store, self._item.members)
                return Stand.WORKING
            if self._stopping.asked:
                return Stand.STOPPED
            left = work.left()
        except MENDED as error:
            self._failure = error
            return Stand.FAILED
        if left and not self._idle:
            self._idle = True
            self._watch.say(f"waiting for {len(left)} shards that others work on: {', '.join(work.others())}")
        return Stand.WAITING if left else Stand.DONE

    def _agreed(self, own: Stand) -> Stand:
        """How the replica stands."""
        replica = self._replica
        if replica.size == 1:
            return own
        if not self._teacher.alike:
            return Stand(replica.ranks.largest([own])[0])
        stand, batch = replica.ranks.on_first(lambda: (own, self._batch))
        self._batch = batch
        return Stand(stand)

    def _answer(self) -> None:
        """Run the teacher once, and hand the answers on if they are wanted."""
        item = self._item
        members = self._shortest() if item is None else item.members
        batch = self._batch or collate(self._store, members)
        try:
            with talking():
                pending = self._teacher.start(batch, Origins(self._store.rows, members))
        except OutOfMemory as error:
            if self._replica.size > 1 or item is None or self._output is None:  # the other ranks are in the middle of this pass
                raise
            self._output.work.halve(item)
            self._watch.event("out_of_memory", {"shard": item.shard, "batch_tokens": item.batch_tokens, "message": str(error)})
            return
        if item is None or self._output is None:
            return
        pipeline = self._output.pipeline
        try:
            pipeline.put(item.shard, item.members, pending)
            if item.last:
                pipeline.finish(item.shard, item.batch_tokens)
        except MENDED as error:
            self._failure = error
        self._watch.answered(item.shard, item.members, batch.input_ids.numel())

    def _shortest(self) -> Ints:
        """The shortest row of the store's first slot, with its partner if it has one."""
        rows = self._store.rows
        members = rows.rows_of(0)
        return whole(rows, members[[int(np.argmin(rows.at(members).length))]])
