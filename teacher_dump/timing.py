"""How long a dump will take and how much memory, from a few real batches of real rows.

The ranks of a replica run the same batches together, so that those of a sharded teacher stay in step.
"""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from online.collate import collate
from online.replica import Replica
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
    padded: int
    """Tokens of all shards that are left, with their padding."""
    rate: float
    """Seconds of a rank for each of them."""
    write_rate: float
    """Seconds to write a byte of a file, compression, checksums and fsync included."""
    memory: int
    """Peak bytes of this process so far, with the longest batch and without shards in flight."""
    device_memory: int
    """Peak bytes on the GPU; 0 without one."""

    def seconds(self, written: int, workers: int = 1) -> float:
        """Teacher and writer together, for files of so many bytes; ``workers`` ranks, or sets of ranks, answer batches side by side.

        On a CPU they share the cores and their times add up; on a GPU the slower one counts.
        """
        teaching, writing = self.rate * self.padded / workers, self.write_rate * written
        return max(teaching, writing) if self.device_memory else teaching + writing


def measure(teacher: TeacherPass, store: Store, shards: Sequence[int], scratch: Path, replica: Replica) -> Timing:
    """Time the dump of ``shards`` by running a few of its batches and writing their answers to ``scratch``.

    Batches are drawn in proportion to their tokens, so the mean of their seconds per token is that of the whole dump.
    """
    batches = [members for shard in shards for members in cut(store.rows, rows_of(store.rows, shard), teacher.batch_tokens)]
    if not batches:
        return Timing([], 0, 0, 0.0, 0.0, _peak_memory(), 0)
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
        late = len(rates) >= 3 and time.perf_counter() > stop
        if replica.ranks.largest([int(late)])[0]:  # all ranks stop at the same batch
            break
    answers = list(answered.values())
    write_rate = _write_rate(teacher, answers, store.manifest.rows, scratch / f"timing-{replica.rank}")
    on_device = torch.cuda.max_memory_allocated(teacher.device) if teacher.device.type == "cuda" else 0
    memory, on_device = replica.ranks.largest([_peak_memory(), on_device])
    return Timing(answers, len(rates), int(tokens.sum()), float(np.mean(rates)), write_rate, memory, on_device)


def _answer(teacher: TeacherPass, store: Store, members: Ints) -> Arrays:
    return teacher.answer(collate(store, members))


def _drawn(tokens: Ints) -> list[int]:
    """Numbers of up to BATCHES batches at equal distances in tokens, in an order that is representative from the start."""
    places = (np.arange(BATCHES) + 0.5) / BATCHES * int(tokens.sum())
    drawn = np.searchsorted(np.cumsum(tokens), places, side="right")
    order = np.argsort([int(f"{place:04b}"[::-1], 2) for place in range(BATCHES)])
    return [int(drawn[place]) for place in order]


def _write_rate(teacher: TeacherPass, answered: Sequence[Arrays], rows: RowsInfo, path: Path) -> float:
    """Seconds to write a byte."""
    seconds, written = 0.0, 0
    for spec in teacher.specs:
        for array in spec.arrays:
            values = np.concatenate([arrays[spec.feature][array.name] for arrays in answered])[: rows.slot_tokens]
            shard = Shard(array, rows.slot_tokens, len(values), rows.chunk(array, spec.feature.positions))
            start = time.perf_counter()
            written += write_slot(path, values, shard).size
            seconds += time.perf_counter() - start
            path.unlink()
    return seconds / max(1, written)


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
