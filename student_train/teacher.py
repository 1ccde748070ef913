"""The teacher of a run that has none in its process: a pass of a store."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from online.batch import Batch, Features
from online.derive import derive
from online.encode import assemble, from_numpy
from online.planner import Units, cover, uncovered
from online.teacher import Fetched
from store.errors import MissingFeature
from store.features import FeatureKey
from store.manifest import PassInfo
from store.reader import Allocate, Store


class StoredTeacher:
    """Answers of pass ``pass_name`` of a store; what is wanted and not stored is derived. Safe to pickle and to fork.

    Args:
        store: Opened, or its folder.
        wanted: Keys without pass names.

    Raises:
        MissingFeature: the store has no such pass, or a key is neither stored nor derivable; the message holds the
            lines of a dump recipe that would add it.
        StoreError: there is no store that can be read.
    """

    def __init__(self, store: Store | Path, pass_name: str, wanted: Collection[FeatureKey]) -> None:
        self._store = store if isinstance(store, Store) else Store.open(store)
        passes = self._store.manifest.passes
        if pass_name not in passes:
            found = ", ".join(sorted(passes)) or "none"
            raise MissingFeature(f"{self._store.path} has no pass {pass_name!r}; it has {found}. {_advice(wanted)}")
        info = passes[pass_name]
        self.shape, self._wiring = info.shape, info.wiring
        self._pass_name = pass_name
        self._wanted = tuple(sorted(wanted))
        self._statics: dict[str, Tensor] = {}
        stored = {spec.feature: spec.unit_bytes for spec in info.features}
        statics = {static.name for static in info.statics}
        if missing := uncovered(self._wanted, stored, statics, self.shape, self._wiring):
            raise MissingFeature(_missing(self._store.path, pass_name, info, missing))
        self._plan = cover(self._wanted, stored, statics, self.shape, self._wiring, Units.average(self._store.rows))

    def __getstate__(self) -> dict[str, Any]:
        """Without the weights: loader processes only fetch."""
        return {**self.__dict__, "_statics": {}}

    def fetch(self, rows: NDArray[np.int64], allocate: Allocate | None = None) -> Fetched:
        """The packed arrays of ``rows`` that the wanted features follow from, in one buffer (from ``allocate``)."""
        read = self._store.read_all([key.of(self._pass_name) for key in self._plan.stored], rows, allocate)
        return {key.of(""): arrays for key, arrays in read.items()}

    @torch.no_grad()
    def features(self, batch: Batch, fetched: Fetched) -> Features:
        """As online.teacher.Teacher says; ``fetched`` is of the same rows in the same order."""
        have: Features = {key: assemble(key, self._store.spec(key.of(self._pass_name)), arrays, batch) for key, arrays in fetched.items()}
        return derive(self._wanted, have, self._statics_on(batch.mask.device), batch, self.shape, self._wiring)

    def _statics_on(self, device: torch.device) -> dict[str, Tensor]:
        if not self._statics:
            dtypes = {static.name: static.dtype for static in self._store.manifest.passes[self._pass_name].statics}
            arrays = self._store.statics(self._pass_name)
            self._statics = {name: from_numpy(arrays[name], dtypes[name], device) for name in self._plan.statics if name in arrays}
        return self._statics


def _missing(store: Path, pass_name: str, info: PassInfo, missing: Collection[FeatureKey]) -> str:
    stored = ", ".join(feature.key for feature in info.features)
    names = ", ".join(map(str, missing))
    requested = [FeatureKey.parse(key) for key in info.requested]
    return (
        f"pass {pass_name} of {store}: {names} neither stored nor to be derived from what is ({stored}).\n"
        f"{_advice([*requested, *missing])}\nThe store keeps its rows; give the pass another pass_name."
    )


def _advice(keys: Collection[FeatureKey]) -> str:
    lines = "".join(f"\n  - {key}" for key in sorted(keys))
    return f"A dump recipe with these lines holds all that is asked for:\nfeatures:{lines}\nMake it with: teacher-dump run RECIPE"
