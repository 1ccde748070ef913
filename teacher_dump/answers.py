"""What a pass answers for single rows: all that is stored, and the logits that follow from it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from online.batch import Selected
from online.collate import collate
from online.derive import derive
from online.encode import assemble, from_numpy, packed_value
from online.words import Words
from store.codecs import decode
from store.features import FeatureKey
from store.reader import Store

_FOR_PEOPLE = ("task_logits", "lm_logits")
"""Sites that are worth deriving to be looked at."""


class Answers:
    """The answers of one pass of a store, float32 (ids int64) by array name, packed [units of the row, width]."""

    def __init__(self, store: Store, pass_name: str) -> None:
        self._store, self._name = store, pass_name
        self._info = store.manifest.passes[pass_name]
        stored = {spec.feature for spec in self._info.features}
        requested = [FeatureKey.parse(key) for key in self._info.requested]
        self._derived = [key for key in requested if key not in stored and key.site in _FOR_PEOPLE]
        arrays = store.statics(pass_name) if self._derived else {}
        dtypes = {static.name: static.dtype for static in self._info.statics}
        self._statics = {name: from_numpy(values, dtypes[name], torch.device("cpu")) for name, values in arrays.items()}

    def of(self, row: int) -> Iterator[tuple[FeatureKey, dict[str, NDArray[Any]]]]:
        """Each feature of ``row``; those that are derived come last."""
        rows = np.array([row])
        packed = {spec: self._store.read(spec.feature.of(self._name), rows) for spec in self._info.features}
        for spec, arrays in packed.items():
            yield spec.feature, decode(spec, arrays)
        if not self._derived:
            return
        batch = collate(self._store, rows)
        have = {spec.feature: assemble(spec.feature, spec, arrays, batch) for spec, arrays in packed.items()}
        for key, value in derive(self._derived, have, self._statics, batch, self._info.shape, self._info.wiring).items():
            value = packed_value(key, value, batch)
            value = value.logits if isinstance(value, Words) else value
            if isinstance(value, torch.Tensor):
                yield key, {"": value.numpy()}
            else:
                assert not isinstance(value, Selected)  # its words are stored, never derived
                named = value._asdict().items()
                yield key, {name: (array if array.dim() > 1 else array[:, None]).numpy() for name, array in named}
