"""The teacher of a run that has none in its process: one or more passes of a store."""

from collections.abc import Collection, Mapping
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
from store import together
from store.errors import MissingFeature
from store.features import FeatureKey
from store.manifest import PassInfo
from store.reader import Allocate, Store
from store.together import PassName, names


class StoredTeacher:
    """Answers of a pass of a store, or of several passes of one teacher; what is wanted and not stored is derived.

    Safe to pickle and to fork.

    Args:
        store: Opened, or its folder.
        pass_name: Where several passes store a feature, the most exact one is read.
        wanted: Keys without pass names.

    Raises:
        MissingFeature: the store has no such pass, or a key is neither stored nor derivable; the message holds the
            lines of a dump recipe that would add it.
        FingerprintMismatch: the passes are not of one teacher.
        StoreError: there is no store that can be read.
    """

    def __init__(self, store: Store | Path, pass_name: PassName, wanted: Collection[FeatureKey]) -> None:
        self._store = store if isinstance(store, Store) else Store.open(store)
        known, own = self._store.manifest.passes, names(pass_name)
        for name in own:
            if name not in known:
                found = ", ".join(sorted(known)) or "none"
                raise MissingFeature(f"{self._store.path} has no pass {name!r}; it has {found}. {_advice(wanted)}")
        passes = {name: known[name] for name in own}
        together.check_same_teacher(passes)
        info = passes[own[0]]
        self.shape, self._wiring = info.shape, info.wiring
        self._wanted = tuple(sorted(wanted))
        self._statics: dict[str, Tensor] = {}
        self._weights = together.statics(passes)
        stored = together.stored(passes)
        sizes = {key: spec.unit_bytes for key, (_, spec) in stored.items()}
        if missing := uncovered(self._wanted, sizes, self._weights, self.shape, self._wiring):
            raise MissingFeature(_missing(self._store.path, passes, missing))
        self._plan = cover(self._wanted, sizes, self._weights, self.shape, self._wiring, Units.average(self._store.rows))
        self._read = {key: key.of(stored[key][0]) for key in self._plan.stored}

    @property
    def passes(self) -> tuple[str, ...]:
        """Those that features are read of."""
        return tuple(sorted({key.pass_name for key in self._read.values()}))

    def __getstate__(self) -> dict[str, Any]:
        """Without the weights: loader processes only fetch."""
        return {**self.__dict__, "_statics": {}}

    def fetch(self, rows: NDArray[np.int64], allocate: Allocate | None = None) -> Fetched:
        """The packed arrays of ``rows`` that the wanted features follow from, in one buffer (from ``allocate``)."""
        read = self._store.read_all(list(self._read.values()), rows, allocate)
        return {key.of(""): arrays for key, arrays in read.items()}

    @torch.no_grad()
    def features(self, batch: Batch, fetched: Fetched) -> Features:
        """As online.teacher.Teacher says; ``fetched`` is of the same rows in the same order."""
        have: Features = {key: assemble(key, self._store.spec(self._read[key]), arrays, batch) for key, arrays in fetched.items()}
        return derive(self._wanted, have, self._statics_on(batch.mask.device), batch, self.shape, self._wiring)

    def _statics_on(self, device: torch.device) -> dict[str, Tensor]:
        if not self._statics:
            needed = {name: self._weights[name] for name in self._plan.statics if name in self._weights}
            arrays = {pass_name: self._store.statics(pass_name) for pass_name in sorted(set(needed.values()))}
            dtypes = {pass_name: self._store.manifest.passes[pass_name].statics for pass_name in arrays}
            types = {(pass_name, static.name): static.dtype for pass_name, statics in dtypes.items() for static in statics}
            self._statics = {name: from_numpy(arrays[of][name], types[of, name], device) for name, of in needed.items()}
        return self._statics


def _missing(store: Path, passes: Mapping[str, PassInfo], missing: Collection[FeatureKey]) -> str:
    stored = ", ".join(feature.key for info in passes.values() for feature in info.features)
    own, keys = ", ".join(passes), ", ".join(map(str, missing))
    requested = [FeatureKey.parse(key) for info in passes.values() for key in info.requested]
    return (
        f"pass{'' if len(passes) == 1 else 'es'} {own} of {store}: {keys} neither stored nor to be derived from what is ({stored}).\n"
        f"{_advice({*requested, *missing})}\nOr keep what is there: `teacher-dump add RECIPE` makes a further pass of what is new, and "
        "the data of this run names both, as in pass_name: [NAME, NAME-2]."
    )


def _advice(keys: Collection[FeatureKey]) -> str:
    lines = "".join(f"\n  - {key}" for key in sorted(keys))
    return f"A dump recipe with these lines holds all that is asked for:\nfeatures:{lines}\nMake it with: teacher-dump run RECIPE"
