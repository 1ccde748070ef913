"""What the training of a phase took of its machine."""

import resource
import sys
from collections.abc import Sequence

import numpy as np
import torch

from store.pool import pools
from store.strict import Strict
from student_train.data import Source

SAMPLE = 64
"""Rows of a source whose features are weighed."""


class Cost(Strict):
    """Of the process of the first rank that ended the phase; one that was interrupted before it doesn't count."""

    seconds: float
    """From its first step, or that after its checkpoint, to the last; with measuring and checkpoints on the way."""
    memory: int
    """Most bytes that lay in main memory at a time, Python and libraries included."""
    gpu_memory: int | None
    """Most bytes that tensors took of the GPU; None without one."""
    feature_bytes: float
    """Bytes of teachers' features that are read for a training row, as stored: mean over the first rows of each source, by the sources'
    weights."""


def cost(seconds: float, sources: Sequence[Source]) -> Cost:
    """That of training on ``sources``, which took so many ``seconds`` and has just ended."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weights = [source.weight for source in sources]
    return Cost(
        seconds=round(seconds, 3),
        memory=largest if sys.platform == "darwin" else 1024 * largest,
        gpu_memory=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        feature_bytes=float(np.average([_bytes_of_row(source) for source in sources], weights=weights)),
    )


def _bytes_of_row(source: Source) -> float:
    if source.teacher is None:
        return 0.0
    pool = pools(source.store, source.split, source.where, source.pass_name)[0]
    rows = pool.take(np.arange(min(SAMPLE, len(pool))))
    fetched = source.teacher.fetch(rows)
    return sum(array.nbytes for arrays in fetched.values() for array in arrays.values()) / len(rows)
