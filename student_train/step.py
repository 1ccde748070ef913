"""What a method may do in a training step beyond one look at the student's features, and what it may know of its rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from online.added import Added
from online.batch import Batch, Features
from online.capture import Capture
from online.models import LoadedModel, forward
from store.features import FeatureKey


@dataclass(frozen=True)
class Survey:
    """The rows that a phase learns from."""

    rows: int
    """Rows of the store, of all splits and copies: row numbers are below it."""
    numbers: NDArray[np.int64]
    """[n] numbers of those that are trained on, ascending."""
    labels: NDArray[np.float64]
    """[n] their labels; NaN without."""


@dataclass(frozen=True)
class Step:
    """One micro-batch, and the student to run on it."""

    student: LoadedModel
    batch: Batch
    teacher: Features
    """What the method reads of its teacher."""
    meta: tuple[Batch, Features] | None
    """Rows of the phase's ``meta`` data and what the method reads of the teacher there (empty where that data has none); None where the
    phase has no such data."""
    past: Sequence[tuple[Batch, Features]] = ()
    """This rank's micro-batches of the last ``look_back`` steps and what the method reads of the teacher there, read again; empty except
    in the first micro-batch of every ``look_back``-th step. Features are empty where the rows had no teacher."""

    def run(self, batch: Batch, keys: Iterable[FeatureKey]) -> Features:
        """The student's ``keys`` on ``batch``, with gradient."""
        return run(self.student, batch, keys)


def run(student: LoadedModel, batch: Batch, keys: Iterable[FeatureKey], added_BTW: Tensor | None = None) -> Features:
    """The student's features on ``batch``, float32, with gradient where it is on; ``added_BTW`` is added to the embedding output."""
    with Added(student, added_BTW), Capture(student, keys, grad=torch.is_grad_enabled()) as capture:
        forward(student, batch)
        return capture.features(batch)
