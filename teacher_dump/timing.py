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
from store.reader import Store
from store.shards import Shard, token_chunk, write_slot
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

    batches: int
    """How many were timed."""
    seconds: float
    """Teacher and writer together, for all shards that are left."""
    memory: int
    """Peak bytes of this process so far, with the longest batch and without shards in flight."""
    device_memory: int
    """Peak bytes on the GPU; 0 without one."""


def measure(teacher: TeacherPass, store: Store, shards: Sequence[int], written: int, batch_tokens: int, scratch: Path) -> Timing:
    """Time the dump of ``shards``, ``written`` bytes in all, by running a few of its batches and writing their answers to ``scratch``.

    Batches are drawn in proportion to their tokens, so the mean of their seconds per token is that of the whole dump. On
    a CPU, teacher and writer share the cores and their times add up; on a GPU the slower one counts.
    """
    batches = [members for shard in shards for members in cut(store.rows, rows_of(store.rows, shard), batch_tokens)]
    if not batches:
        return Timing(0, 0.0, _peak_memory(), 0)
    tokens = np.array([int(padded_lengths(store.rows, members).sum()) for members in batches], np.int64)
    longest = max(range(len(batches)), key=lambda number: (int(store.rows.at(batches[number]).length.max()), int(tokens[number])))
    _answer(teacher, store, batches[longest])  # warms up, and reaches the peak of memory
    answered: list[Arrays] = []
    rates: list[float] = []
    kept, stop = 0, time.perf_counter() + SECONDS
    for number in _drawn(tokens):
        start = time.perf_counter()
        arrays = _answer(teacher, store, batches[number])
        rates.append((time.perf_counter() - start) / int(tokens[number]))
        if kept < _KEEP:
            answered.append(arrays)
            kept += sum(values.nbytes for named in arrays.values() for values in named.values())
        if len(rates) >= 3 and time.perf_counter() > stop:
            break
    teaching = float(np.mean(rates)) * int(tokens.sum())
    writing = _write_rate(teacher, answered, store.manifest.rows.slot_tokens, scratch) * written
    if teacher.device.type == "cuda":
        return Timing(len(rates), max(teaching, writing), _peak_memory(), torch.cuda.max_memory_allocated(teacher.device))
    return Timing(len(rates), teaching + writing, _peak_memory(), 0)


def _answer(teacher: TeacherPass, store: Store, members: Ints) -> Arrays:
    return teacher.answer(collate(store, members))


def _drawn(tokens: Ints) -> list[int]:
    """Numbers of up to BATCHES batches at equal distances in tokens, in an order that is representative from the start."""
    places = (np.arange(BATCHES) + 0.5) / BATCHES * int(tokens.sum())
    drawn = np.searchsorted(np.cumsum(tokens), places, side="right")
    order = np.argsort([int(f"{place:04b}"[::-1], 2) for place in range(BATCHES)])
    return [int(drawn[place]) for place in order]


def _write_rate(teacher: TeacherPass, answered: Sequence[Arrays], slot_tokens: int, scratch: Path) -> float:
    """Seconds to write a byte, checksums and fsync included."""
    seconds, written, number = 0.0, 0, 0
    for spec in teacher.specs:
        for array in spec.arrays:
            values = np.concatenate([arrays[spec.feature][array.name] for arrays in answered])[:slot_tokens]
            start = time.perf_counter()
            write_slot(scratch / f"timing-{number}", values, Shard(array, slot_tokens, len(values), token_chunk(slot_tokens)))
            seconds += time.perf_counter() - start
            written += values.nbytes
            number += 1
    return seconds / max(1, written)


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
