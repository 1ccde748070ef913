"""Teachers: whatever answers for a batch with features."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from online.batch import Batch, Features
from online.capture import check_key
from online.derive import derive
from online.encode import packed_in_form, padded_value
from online.interchange import answered, written
from online.kept_words import refuse_own_words
from online.models import LoadedModel
from online.planner import TYPICAL, Units, plan
from online.statics import live_statics
from store.features import FeatureKey
from store.intervention import Intervention
from store.reader import Allocate

Fetched = dict[FeatureKey, dict[str, NDArray[Any]]]
"""Packed arrays of a batch as they lie in a store."""


class Teacher(Protocol):
    """Answers for the rows of one store."""

    def fetch(self, rows: NDArray[np.int64], allocate: Allocate | None = None) -> Fetched:
        """What a loader process reads ahead for ``rows``, which :meth:`features` then gets; nothing for a live model.

        ``allocate`` gives the memory to read into, once; by default it is NumPy's.
        """
        ...

    def features(self, batch: Batch, fetched: Fetched) -> Features:
        """The wanted features of ``batch``, float32, without gradient, under keys without a pass name."""
        ...


class LiveTeacher:
    """A model that answers now.

    It reads what a store for the same features would hold, drops what stands on padding and derives the rest, so that
    its answers are those of a store, bit for bit where batches are padded alike.

    Args:
        loaded: Is put in eval mode; its weights must not change any more.
        wanted: Keys without pass names.
        units: How many values a row has on average, as in the plan of the store that answers are compared with.
        intervention: What is written into the model; rows then stand in pairs.

    Raises:
        ValueError: the model has no such feature, or a key has the form ``select``, whose words only a store knows.
    """

    def __init__(
        self, loaded: LoadedModel, wanted: Collection[FeatureKey], units: Units = TYPICAL, intervention: Intervention | None = None
    ) -> None:
        for key in wanted:
            if key.form == "select":
                raise ValueError(f"{key}: only a store knows which words were chosen; expected {replace(key, form='')} or a top form")
        self.shape = loaded.shape
        self._loaded = loaded
        self._wanted = tuple(sorted(wanted))
        self._plan = plan(dict.fromkeys(self._wanted, "float32"), loaded.shape, loaded.wiring, units)
        self._read = {key: replace(key, form="") for key in self._plan.stored}
        self._intervention = intervention
        for key in (*self._read.values(), *(written(intervention.layers) if intervention else ())):
            check_key(loaded, key)
        refuse_own_words(loaded.model, self._wanted)
        self._statics: dict[str, Tensor] = {}
        loaded.model.eval()

    def fetch(self, rows: NDArray[np.int64], allocate: Allocate | None = None) -> Fetched:
        """Nothing."""
        return {}

    @torch.no_grad()
    def features(self, batch: Batch, fetched: Fetched) -> Features:
        """As :class:`Teacher` says; one forward pass (two with an intervention) in the model's own type, whatever autocast is on."""
        loaded = self._loaded
        if not self._wanted:  # methods that work with the model itself may ask for nothing else
            return {}
        with torch.autocast(batch.mask.device.type, enabled=False):
            captured = answered(loaded, batch, self._read.values(), self._intervention)
        have: Features = {}
        for key, source in self._read.items():
            have[key] = padded_value(key, packed_in_form(key, captured[source], batch), batch)
        if not self._statics:
            self._statics = float_statics(live_statics(loaded, self._plan.statics))
        return derive(self._wanted, have, self._statics, batch, loaded.shape, loaded.wiring)


class Teachers:
    """Several teachers of the same rows; each answers under its name, which is the pass name of its keys."""

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        self._teachers = dict(teachers)

    def fetch(self, rows: NDArray[np.int64], allocate: Allocate | None = None) -> Fetched:
        """What each reads ahead, in memory of its own: ``allocate`` gives memory once."""
        return {key.of(name): arrays for name, teacher in self._teachers.items() for key, arrays in teacher.fetch(rows).items()}

    def features(self, batch: Batch, fetched: Fetched) -> Features:
        """As :class:`Teacher` says, under keys with the teachers' names."""
        found: Features = {}
        for name, teacher in self._teachers.items():
            read = {key.of(""): arrays for key, arrays in fetched.items() if key.pass_name == name}
            found |= {key.of(name): value for key, value in teacher.features(batch, read).items()}
        return found


def float_statics(statics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as derivations read them, live or stored: float32 copies laid out alike, so that products agree to the bit."""
    return {name: weight.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True) for name, weight in statics.items()}
