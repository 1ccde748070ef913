"""What one rank has to answer: shards that it claims one after the other, as batches."""

from collections import deque
from typing import NamedTuple

from store.table import Ints, RowTable
from store.writer import StoreWriter
from teacher_dump.batches import cut, padded_lengths, rows_of, together
from teacher_dump.out_of_memory import alone

CLAIMS = 8
"""Shards that are claimed at once while many are left."""


class Item(NamedTuple):
    """One batch."""

    shard: int
    members: Ints
    """Numbers of its rows."""
    batch_tokens: int
    """Padded tokens that the batches of its shard are held to."""
    last: bool
    """Whether it is the last one of its shard."""


class Work:
    """The batches of the shards that this rank can get, until other ranks and jobs work on all that are left."""

    def __init__(self, writer: StoreWriter, pass_name: str, rows: RowTable, batch_tokens: int) -> None:
        self._writer, self._name, self._rows = writer, pass_name, rows
        self._batch_tokens = batch_tokens
        self._claimed: deque[int] = deque()
        self._batches: deque[Ints] = deque()
        self._tokens = batch_tokens
        self.shard: int | None = None
        """The shard that is being answered."""
        self.answered: list[int] = []
        """Those of which every batch was given out."""

    def next(self, claiming: bool) -> Item | None:
        """The next batch; None where none can be had now, or where only a new shard has one and this rank is not ``claiming`` any."""
        if self.shard is None:
            if not claiming or not self._claim():
                return None
            self.shard = self._claimed.popleft()
            self._tokens = self._batch_tokens
            self._batches.extend(cut(self._rows, rows_of(self._rows, self.shard), self._tokens))
        item = Item(self.shard, self._batches.popleft(), self._tokens, last=not self._batches)
        if item.last:
            self.answered.append(item.shard)
            self.shard = None
        return item

    def halve(self, item: Item) -> None:
        """Take back a batch for which memory did not suffice, and go on with half of its tokens to the end of the shard.

        Raises:
            OutOfMemory: it is a single row, or pair.
        """
        if len(item.members) == together(self._rows):
            length = int(self._rows.at(item.members).length[0])
            raise alone(int(item.members[0]), length)
        if item.last:
            self.shard = self.answered.pop()
        self._tokens = min(self._tokens, int(padded_lengths(self._rows, item.members).sum())) // 2
        left = [item.members, *self._batches]
        self._batches = deque(part for members in left for part in cut(self._rows, members, self._tokens))

    def left(self) -> list[int]:
        """Shards of the pass that are not committed and that this rank has not answered."""
        return [shard for shard in self._writer.pending(self._name) if shard not in self.answered]

    def others(self) -> list[str]:
        """The other processes that write to the store now."""
        return self._writer.others()

    def _claim(self) -> bool:
        """Whether there is a shard to begin."""
        if not self._claimed:
            at_once = max(1, min(CLAIMS, len(self._writer.pending(self._name)) // 64))
            self._claimed.extend(self._writer.claim(self._name, at_once))
        return bool(self._claimed)
