"""How far derived features are from live ones, measured on a few real rows."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from online.batch import Batch, Features, TopK, Value
from online.capture import Capture
from online.collate import collate
from online.derive import PAIRWISE, derive
from online.encode import assemble, encode
from online.masks import pair_mask
from online.models import forward
from online.statics import live_statics
from online.teacher import float_statics
from store.codecs import feature_spec
from store.features import Dtype, FeatureKey
from store.reader import Store
from teacher_dump.batches import cut, padded_lengths
from teacher_dump.teacher import Origins, TeacherPass

SAMPLE_ROWS = 8
SAMPLE_TOKENS = 2048
"""Padded tokens after which no further row is taken."""


def sample(store: Store, batch_tokens: int) -> list[tuple[Batch, Origins]]:
    """A few rows from all over ``store`` as teacher batches, and where they come from."""
    rows = np.unique(np.linspace(0, len(store.rows) - 1, SAMPLE_ROWS).astype(np.int64))
    before = np.cumsum(padded_lengths(store.rows, rows)) - padded_lengths(store.rows, rows)
    return [
        (collate(store, members), Origins(store.rows, members)) for members in cut(store.rows, rows[before < SAMPLE_TOKENS], batch_tokens)
    ]


def derived_errors(teacher: TeacherPass, batches: Sequence[tuple[Batch, Sequence[str]]], dtype: Dtype | None = None) -> dict[str, float]:
    """Derived feature -> ||derived - live|| / ||live|| over ``batches``, each number of which is checked to be finite.

    The live value comes from the model itself, the derived one from what the store will hold and the shipped weights.

    Args:
        dtype: stored type to try instead of the recipe's.

    Raises:
        ValueError: a stored number would not be finite; names row and feature.
    """
    shape, wiring = teacher.loaded.shape, teacher.loaded.wiring
    specs = [
        spec if dtype is None else feature_spec(spec.feature, dtype, shape.width_of(spec.feature.site), spec.ids) for spec in teacher.specs
    ]
    statics = float_statics(live_statics(teacher.loaded, teacher.plan.statics))
    wanted = list(teacher.plan.derived)
    plain = {replace(key, form="") for key in (*wanted, *(spec.feature for spec in specs))}
    sums = {key: np.zeros(2) for key in wanted}
    for batch, sources in batches:
        batch = batch.to(teacher.device)
        with torch.inference_mode():
            with Capture(teacher.loaded, plain) as capture:
                forward(teacher.loaded, batch)
            live = capture.features(batch)
            stored: Features = {}
            for spec in specs:
                arrays = encode(spec.feature, live[replace(spec.feature, form="")], batch, spec, sources)
                stored[spec.feature] = assemble(spec.feature, spec, arrays, batch)
            derived = derive(wanted, stored, statics, batch, shape, wiring)
            exact = derive(wanted, live, statics, batch, shape, wiring)
            for key in wanted:
                found, true = _numbers(key, derived[key], batch, teacher), _numbers(key, exact[key], batch, teacher)
                sums[key] += [float((found - true).square().sum()), float(true.square().sum())]
    return {str(key): float(np.sqrt(error / max(norm, 1e-30))) for key, (error, norm) in sums.items()}


def _numbers(key: FeatureKey, value: Value, batch: Batch, teacher: TeacherPass) -> Tensor:
    """The numbers of ``value`` that mean something, in float64."""
    if isinstance(value, TopK):
        return value.log_probs.double()
    assert isinstance(value, Tensor)
    if key.site in PAIRWISE:
        assert key.layer is not None
        pairs = pair_mask(batch, teacher.loaded.shape, key.layer) & batch.mask[:, None, :, None]
        return value.double().masked_select(pairs)
    if key.positions == "all":
        return value.double()[batch.mask]
    return value.double()
