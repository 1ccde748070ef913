"""How long a dump will take and how much memory, from a few real batches of real rows."""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from online.collate import collate
from store.manifest import RowsInfo
from store.reader import Store
from store.shards import Shard, write_slot
from store.table import Ints
from teacher_dump.batches import Arrays, cut, padded_lengths, rows_of
from teacher_dump.teacher import TeacherPass

BATCHES = 12
SECONDS = 30.0
"""Timing stops after this long; three batches are always run."""
_KEEP = 256 << 20
"""Bytes of answers that are kept to time the writing of them."""


@dataclass(frozen=True)
class Timing:
    """What a dump takes beside disk."""

    answered: list[Arrays]
    """What the teacher answered to different batches, as many as are kept."""
    batches: int
    """How many were timed."""
    teaching: float
    """Seconds that the teacher takes for all shards that are left."""
    write_rate: float
    """Seconds to write a byte of a file, compression, checksums and fsync included."""
    memory: int
    """Peak bytes of this process so far, with the longest batch and without shards in flight."""
    device_memory: int
    """Peak bytes on the GPU; 0 without one."""

    def seconds(self, written: int) -> float:
        """Teacher and writer together, for files of so many bytes.

        On a CPU they share the cores and their times add up; on a GPU the slower one counts.
        """
        writing = self.write_rate * written
        return max(self.teaching, writing) if self.device_memory else self.teaching + writing


def measure(teacher: TeacherPass, store: Store, shards: Sequence[int], batch_tokens: int, scratch: Path) -> Timing:
    """Time the dump of ``shards`` by running a few of its batches and writing their answers to ``scratch``.

    Batches are drawn in proportion to their tokens, so the mean of their seconds per token is that of the whole dump.
    """
    batches = [members for shard in shards for members in cut(store.rows, rows_of(store.rows, shard), batch_tokens)]
    if not batches:
        return Timing([], 0, 0.0, 0.0, _peak_memory(), 0)
    tokens = np.array([int(padded_lengths(store.rows, members).sum()) for members in batches], np.int64)
    longest = max(range(len(batches)), key=lambda number: (int(store.rows.at(batches[number]).length.max()), int(tokens[number])))
    _answer(teacher, store, batches[longest])  # warms up, and reaches the peak of memory
    answered: dict[int, Arrays] = {}
    rates: list[float] = []
    kept, stop = 0, time.perf_counter() + SECONDS
    for number in _drawn(tokens):
        start = time.perf_counter()
        arrays = _answer(teacher, store, batches[number])
        rates.append((time.perf_counter() - start) / int(tokens[number]))
        if kept < _KEEP and number not in answered:
            answered[number] = arrays
            kept += sum(values.nbytes for named in arrays.values() for values in named.values())
        if len(rates) >= 3 and time.perf_counter() > stop:
            break
    teaching = float(np.mean(rates)) * int(tokens.sum())
    answers = list(answered.values())
    rate = _write_rate(teacher, answers, store.manifest.rows, scratch)
    on_device = torch.cuda.max_memory_allocated(teacher.device) if teacher.device.type == "cuda" else 0
    return Timing(answers, len(rates), teaching, rate, _peak_memory(), on_device)


def _answer(teacher: TeacherPass, store: Store, members: Ints) -> Arrays:
    return teacher.answer(collate(store, members))


def _drawn(tokens: Ints) -> list[int]:
    """Numbers of up to BATCHES batches at equal distances in tokens, in an order that is representative from the start."""
    places = (np.arange(BATCHES) + 0.5) / BATCHES * int(tokens.sum())
    drawn = np.searchsorted(np.cumsum(tokens), places, side="right")
    order = np.argsort([int(f"{place:04b}"[::-1], 2) for place in range(BATCHES)])
    return [int(drawn[place]) for place in order]


def _write_rate(teacher: TeacherPass, answered: Sequence[Arrays], rows: RowsInfo, scratch: Path) -> float:
    """Seconds to write a byte."""
    seconds, written = 0.0, 0
    for spec in teacher.specs:
        for array in spec.arrays:
            values = np.concatenate([arrays[spec.feature][array.name] for arrays in answered])[: rows.slot_tokens]
            shard = Shard(array, rows.slot_tokens, len(values), rows.chunk(array, spec.feature.positions))
            path = scratch / "timing"
            start = time.perf_counter()
            written += write_slot(path, values, shard).size
            seconds += time.perf_counter() - start
            path.unlink()
    return seconds / max(1, written)


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
