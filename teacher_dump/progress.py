"""How far a pass is and how fast it goes, and the bar that shows it."""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from online.figures import duration
from store.commits import Logs
from store.table import RowTable
from teacher_dump.totals import Totals

WINDOW = 300.0
"""Seconds over which speed is measured: shards come in one by one."""
LINE = 15.0
"""Seconds from one line to the next where standard error is no terminal."""


class Answered(NamedTuple):
    """Of rows that are answered, with the bytes of their files."""

    rows: int = 0
    tokens: int = 0
    bytes: int = 0


class Committed:
    """What all ranks of all jobs have committed of a pass, read from the store's logs."""

    def __init__(self, store: Path, pass_name: str, rows: RowTable) -> None:
        self._logs, self._name, self._rows = Logs(store), pass_name, rows
        self.shards: set[int] = set()
        self.amount = Answered()
        self.look()

    def look(self) -> None:
        """Hear what was committed since; raises StoreError where the logs are damaged."""
        self._logs.refresh()
        commits = self._logs.committed.get(self._name, {})
        new = [shard for shard in commits.keys() - self.shards if 0 <= shard < self._rows.info.slots]
        size = sum(seal.size for shard in new for seal in commits[shard].files.values())
        self.shards.update(new)
        rows, tokens, known = self.amount
        self.amount = Answered(rows + int(self._rows.slot_rows[new].sum()), tokens + int(self._rows.slot_tokens[new].sum()), known + size)


class Speed:
    """How fast an amount grows: over the last minutes, or since the start where nothing came in them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, Answered]] = deque()
        self._first: tuple[float, Answered] | None = None

    def per_second(self, amount: Answered) -> tuple[float, float, float]:
        """Rows, tokens and bytes a second, now that there is ``amount``."""
        now = self._clock()
        if self._first is None:
            self._first = (now, amount)
        while self._samples and now - self._samples[0][0] > WINDOW:
            self._samples.popleft()
        if not self._samples or now - self._samples[-1][0] >= WINDOW / 300:
            self._samples.append((now, amount))
        found = []
        for place, count in enumerate(amount):
            since, before = self._samples[0] if count > self._samples[0][1][place] else self._first
            found.append((count - before[place]) / max(now - since, 1e-9) if count > before[place] else 0.0)
        return found[0], found[1], found[2]


class Bar:
    """The progress of a whole pass on standard error: a bar on a terminal, a line now and then elsewhere.

    Raises:
        StoreError: the store's commit logs are damaged.
    """

    def __init__(self, store: Path, pass_name: str, rows: RowTable) -> None:
        self._name, self._info = pass_name, rows.info
        self._next, self._spoken = time.monotonic() + LINE, False
        self._speed = Speed()
        self.committed = Committed(store, pass_name, rows)
        self._speed.per_second(self.committed.amount)  # counts from here on
        self._bar = None
        if _columns():
            form = "{desc} {percentage:3.0f}%|{bar}|"
            self._bar = tqdm(total=rows.info.tokens, desc=pass_name, file=sys.stderr, dynamic_ncols=True, bar_format=form)

    def show(self, under_way: Iterable[Answered], totals: Totals, last: bool = False) -> None:
        """Draw it.

        Args:
            under_way: What this rank has answered of shards that are not committed yet.
            totals: What it did in all.
        """
        done = self.committed.amount
        for each in under_way:
            done = Answered(done.rows + each.rows, done.tokens + each.tokens, done.bytes)
        text = self._text(done, totals)
        if self._bar is not None:
            self._bar.n = min(done.tokens, self._info.tokens)
            self._bar.bar_format = "{desc} {percentage:3.0f}%|{bar}| " + text
            self._bar.refresh()
        elif (last and self._spoken) or time.monotonic() >= self._next:
            self._next, self._spoken = time.monotonic() + LINE, True
            tqdm.write(f"{self._name} {done.tokens / max(1, self._info.tokens):.0%}, {text}", file=sys.stderr)

    def close(self) -> None:
        """Leave it as it is."""
        if self._bar is not None:
            self._bar.close()

    def _text(self, done: Answered, totals: Totals) -> str:
        rows, tokens, written = self._speed.per_second(done)
        left = self._info.tokens - done.tokens
        eta = duration(left / max(tokens, 1e-9)) if tokens or not left else "?"
        parts = [
            f"{len(self.committed.shards):,} of {self._info.slots:,} shards, ETA {eta}",
            f"{rows:,.0f} rows/s, {tokens:,.0f} tokens/s, {written / 1e6:,.1f} MB/s",
        ]
        if totals.queue_limit:
            parts.append(f"queue {totals.queue_bytes / totals.queue_limit:.0%}, waited {duration(totals.disk_wait)} for the disk")
        if totals.mfu is not None:
            parts.append(f"MFU {totals.mfu:.0%}")
        return ", ".join(parts)


def _columns() -> int:
    """Width of the terminal that standard error is; 0 where it is none, or one that does not know its width."""
    return os.get_terminal_size(sys.stderr.fileno()).columns if sys.stderr.isatty() else 0
