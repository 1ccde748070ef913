"""A live teacher that several ranks compute together, while each has rows of its own: they answer one rank's rows after the other."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import distributed as dist

from online.batch import Batch, Features
from online.ranks import talking
from online.teacher import Fetched, LiveTeacher
from store.reader import Allocate


class TakingTurns:
    """Under tensor parallelism every rank holds a slice of each matrix, so that all of them must run the same rows.

    All ranks of the default process group call ``features`` as often as each other; who has nothing to ask hangs the others.
    """

    def __init__(self, teacher: LiveTeacher) -> None:
        self._teacher = teacher

    def fetch(self, rows: NDArray[np.int64], allocate: Allocate | None = None) -> Fetched:
        """Nothing."""
        return {}

    def features(self, batch: Batch, fetched: Fetched) -> Features:
        """The wanted features of ``batch``, as :class:`online.teacher.Teacher` says."""
        device, mine = batch.mask.device, dist.get_rank()
        batches: list[Any] = [None] * dist.get_world_size()
        with talking():
            dist.all_gather_object(batches, batch)
            for rank, one in enumerate(batches):
                answers = self._teacher.features(one.to(device), fetched)
                if rank == mine:
                    own = answers
        return own
