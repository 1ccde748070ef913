"""Answers on their way from the teacher to the disk, behind the forward pass."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Condition
from types import TracebackType
from typing import Self

from online.pending import Pending
from store.features import FeatureSpec
from store.table import Ints, RowTable
from store.writer import StoreWriter
from teacher_dump.batches import ShardBuffer

SHARDS = 3
"""Shards that a run holds in memory at most: one is filled, one is written, one waits."""


def shard_bytes(rows: RowTable, specs: Sequence[FeatureSpec]) -> Ints:
    """[slots] bytes of the answers to each shard in memory."""
    return sum((rows.slot_units(spec.feature.positions) * spec.unit_bytes for spec in specs), start=0 * rows.slot_tokens)


def memory_limit(rows: RowTable, specs: Sequence[FeatureSpec]) -> int:
    """Bytes of answers that a run lets wait: SHARDS times those of the largest shard, whatever the batches are."""
    return SHARDS * int(shard_bytes(rows, specs).max(initial=0))


class Pipeline:
    """Takes the answers to batches, puts them in their places in their shards and commits the shards, in threads of its own.

        with Pipeline(writer, "bert", rows, specs, memory_limit(rows, specs), print) as pipeline:
            pipeline.put(shard, members, teacher.start(batch))
            ...
            pipeline.finish(shard, batch_tokens)

    What waits is counted in bytes: answers that have not been placed, shards that are being filled, and shards that have not been
    committed. It stays within ``limit`` where that has room for one shard and one batch more than the unfinished shards; beside it
    there is the batch that its caller holds. Without that room one batch and one shard at a time are let through.

    Leaving drains it. Leaving with an error, or after one behind, gives up what is not yet being committed.

    Args:
        limit: Bytes that may wait.
        committed: Told of each shard that is committed, the bytes of its files and the seconds that it took, in a thread of this class.
    """

    def __init__(
        self,
        writer: StoreWriter,
        pass_name: str,
        rows: RowTable,
        specs: Sequence[FeatureSpec],
        limit: int,
        committed: Callable[[int, int, float], None],
    ) -> None:
        self._writer, self._name, self._rows, self._specs = writer, pass_name, rows, specs
        self._sizes = shard_bytes(rows, specs).tolist()
        self._committed = committed
        self._filling: set[int] = set()
        self._buffers: dict[int, ShardBuffer] = {}
        self._dropped: set[int] = set()
        self._placing = ThreadPoolExecutor(1, "placer")
        self._writing = ThreadPoolExecutor(1, "writer")
        self._changed = Condition()
        self._behind = 0
        self._failure: BaseException | None = None
        self.limit = limit
        self.waiting = 0
        """Bytes that wait now."""
        self.waited = 0.0
        """Seconds that :meth:`put` has waited for the disk so far."""
        self.committing: tuple[int, float] | None = None
        """The shard that is being committed, and since when (time.monotonic)."""

    def put(self, shard: int, members: Ints, pending: Pending) -> None:
        """Hand over the answers to the rows ``members`` of a shard; waits while too much is on its way.

        Raises:
            ValueError, StoreError, OSError: what failed behind: a number is not finite, or a shard could not be committed.
        """
        needed = pending.nbytes + (0 if shard in self._filling else self._sizes[shard])
        start = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not self._behind or self.waiting + needed <= self.limit)
            self.waiting += needed
        self.waited += time.perf_counter() - start
        self.check()
        self._filling.add(shard)
        self._submit(self._placing, partial(self._place, shard, members, pending))

    def finish(self, shard: int, batch_tokens: int) -> None:
        """Commit a shard once the answers that were put are in their places: they are all of its rows.

        Args:
            batch_tokens: Padded tokens that its batches were held to.

        Raises:
            ValueError, StoreError, OSError: as :meth:`put` does.
        """
        self.check()
        if shard not in self._filling:  # it has no rows
            with self._changed:
                self.waiting += self._sizes[shard]
        self._filling.discard(shard)
        self._submit(self._placing, partial(self._hand_on, shard, batch_tokens))

    def drop(self, shard: int) -> None:
        """Forget a shard that is not finished."""
        if shard in self._filling:
            self._filling.remove(shard)
            self._dropped.add(shard)
            self._submit(self._placing, partial(self._forget, shard))

    def drain(self) -> None:
        """Wait until all finished shards are committed; raises as :meth:`put` does."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not self._behind)
        self.check()

    def check(self) -> None:
        """Raise what failed behind, if anything did."""
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.drain()
        finally:
            with self._changed:
                self._failure = self._failure or error or RuntimeError("the pipeline is closed")
            self._placing.shutdown(cancel_futures=True)  # only the placer gives the writer work
            self._writing.shutdown(cancel_futures=True)
            self._buffers.clear()

    def _submit(self, pool: ThreadPoolExecutor, task: Callable[[], int]) -> None:
        """Run ``task`` in a thread of ``pool`` unless something fails before; it returns how many bytes do not wait any more."""

        def run() -> None:
            freed = 0
            try:
                if self._failure is None:
                    freed = task()
            except BaseException as error:  # raised where the next answers come from
                self._failure = self._failure or error
            with self._changed:
                self.waiting -= freed
                self._behind -= 1
                self._changed.notify_all()

        with self._changed:
            self._behind += 1
        pool.submit(run)

    def _place(self, shard: int, members: Ints, pending: Pending) -> int:
        if shard not in self._dropped:
            self._buffer(shard).place(members, pending.arrays())
        return pending.nbytes

    def _hand_on(self, shard: int, batch_tokens: int) -> int:
        buffer = self._buffer(shard)
        del self._buffers[shard]
        self._submit(self._writing, partial(self._commit, shard, buffer, batch_tokens))
        return 0

    def _commit(self, shard: int, buffer: ShardBuffer, batch_tokens: int) -> int:
        start = time.monotonic()
        self.committing = (shard, start)
        try:
            written = self._writer.commit(self._name, shard, buffer.arrays, batch_tokens)
        finally:
            self.committing = None
        self._committed(shard, written, time.monotonic() - start)
        return int(self._sizes[shard])

    def _forget(self, shard: int) -> int:
        self._buffers.pop(shard, None)
        self._dropped.remove(shard)
        return int(self._sizes[shard])

    def _buffer(self, shard: int) -> ShardBuffer:
        if shard not in self._buffers:
            self._buffers[shard] = ShardBuffer(self._rows, shard, self._specs)
        return self._buffers[shard]
