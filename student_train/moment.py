"""Where a run stands, and draws that follow from it alone: the same on all ranks, and again after a resumption."""

import hashlib
import json
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Moment:
    """The optimiser step that is about to be taken."""

    step: int
    """Optimiser steps taken before it."""
    steps: int
    """Those of the whole phase."""
    epoch_steps: float
    """Those that go once through the data."""
    seed: int

    @property
    def share(self) -> float:
        """How much of the phase is behind it, 0 to 1."""
        return min(1.0, self.step / self.steps)

    @property
    def epoch(self) -> int:
        """Number of the epoch it lies in, from 0."""
        return int(self.step / self.epoch_steps)

    @property
    def epochs(self) -> int:
        """How many epochs the phase has, a begun one counted."""
        return max(1, -int(-self.steps // self.epoch_steps))

    def draws(self, purpose: str, number: int) -> np.random.Generator:
        """A generator that depends on nothing but the run's seed, ``purpose`` and ``number`` (a step, an epoch)."""
        address = json.dumps([self.seed, purpose, number]).encode()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(hashlib.blake2b(address, digest_size=16).digest())))


START = Moment(step=0, steps=1, epoch_steps=1.0, seed=0)
"""Before any run."""
