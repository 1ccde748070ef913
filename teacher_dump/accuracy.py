"""How far derived features are from live ones, measured on a few real rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from online.batch import Batch, Features, TopBanded, TopK, Value
from online.collate import collate
from online.derive import PAIRWISE, derive
from online.encode import assemble, encode
from online.interchange import answered
from online.masks import pair_mask
from online.statics import live_statics
from online.teacher import float_statics
from online.words import Words
from store.codecs import feature_spec
from store.codecs.topk import UNUSED
from store.features import MANTISSA, FeatureKey, FeatureSpec, StoreDtype
from store.reader import Store
from teacher_dump.batches import cut, padded_lengths, whole
from teacher_dump.out_of_memory import out_of_memory
from teacher_dump.teacher import Origins, TeacherPass

SAMPLE_ROWS = 8
SAMPLE_TOKENS = 2048
"""Padded tokens after which no further row is taken."""


def sample(store: Store, batch_tokens: int) -> list[tuple[Batch, Origins]]:
    """A few rows from all over ``store`` as teacher batches, and where they come from."""
    rows = np.unique(np.linspace(0, len(store.rows) - 1, SAMPLE_ROWS).astype(np.int64))
    before = np.cumsum(padded_lengths(store.rows, rows)) - padded_lengths(store.rows, rows)
    chosen = whole(store.rows, rows[before < SAMPLE_TOKENS])
    return [(collate(store, members), Origins(store.rows, members)) for members in cut(store.rows, chosen, batch_tokens)]


@dataclass(frozen=True)
class Live:
    """What the teacher itself says about a batch, of all features that are stored or derived."""

    batch: Batch
    sources: Sequence[str]
    values: Features


def live(teacher: TeacherPass, batches: Sequence[tuple[Batch, Sequence[str]]]) -> list[Live]:
    """The teacher's own answers to ``batches``; raises OutOfMemory where one of them is too large."""
    plain = {replace(key, form="") for key in (*teacher.plan.derived, *(spec.feature for spec in teacher.specs))}
    found = []
    for batch, sources in batches:
        batch = batch.to(teacher.device)
        with out_of_memory(teacher.device, *batch.mask.shape):
            found.append(Live(batch, sources, answered(teacher.loaded, batch, plain, teacher.info.intervention)))
    return found


def derived_errors(teacher: TeacherPass, answers: Sequence[Live]) -> dict[str, float]:
    """The errors of derived features alone; see :func:`errors`."""
    if not teacher.plan.derived:
        return {}
    found = errors(teacher, answers, teacher.specs)
    return {str(key): found[str(key)] for key in teacher.plan.derived}


def errors(teacher: TeacherPass, answers: Sequence[Live], specs: Sequence[FeatureSpec]) -> dict[str, float]:
    """Feature -> ||found - live|| / ||live||, each number of which is checked to be finite.

    What is found is read back from what a store with ``specs`` holds, or derived from it with the shipped weights. Stored
    features that keep words are left out; of likeliest words it is that of their log-probabilities, and of words that are drawn that of
    the logits which they are drawn by.

    Raises:
        ValueError: a stored number would not be finite; names row and feature.
    """
    shape, wiring = teacher.loaded.shape, teacher.loaded.wiring
    statics = float_statics(live_statics(teacher.loaded, teacher.plan.statics))
    wanted = [*(spec.feature for spec in specs if not spec.feature.words), *teacher.plan.derived]
    sums = {key: np.zeros(2) for key in wanted}
    compared = {key: replace(key, form="") if key.words and "draw" in key.form else key for key in wanted}
    for answer in answers:
        batch, stored = answer.batch, {}
        with torch.no_grad():
            for spec in specs:
                arrays = encode(spec.feature, answer.values[replace(spec.feature, form="")], batch, spec, answer.sources)
                stored[spec.feature] = assemble(spec.feature, spec, arrays, batch)
            found = derive(compared.values(), stored, statics, batch, shape, wiring)
            exact = derive(compared.values(), answer.values, statics, batch, shape, wiring)
            for key, other in compared.items():
                for there, true in _pairs(key, found[other], exact[other], batch, teacher):
                    sums[key] += [float((there - true).square().sum()), float(true.square().sum())]
    return {str(key): float(np.sqrt(error / max(norm, 1e-30))) for key, (error, norm) in sums.items()}


def stored_as(teacher: TeacherPass, dtype: StoreDtype) -> list[FeatureSpec]:
    """What the store would hold with every number in ``dtype`` and without rounding; words are kept in float types only."""
    return [
        spec
        if spec.feature.words and dtype not in MANTISSA
        else feature_spec(spec.feature, dtype, teacher.loaded.shape.unit_width(spec.feature), spec.ids)
        for spec in teacher.specs
    ]


def _pairs(key: FeatureKey, found: Value, exact: Value, batch: Batch, teacher: TeacherPass) -> Iterator[tuple[Tensor, Tensor]]:
    """The numbers of both that mean something, in float64; of word logits a few tokens at a time."""
    if isinstance(found, Words) and isinstance(exact, Words):
        yield from ((there.double(), true.double()) for there, true in zip(found.chunks(), exact.chunks(), strict=True))
    elif isinstance(found, TopK | TopBanded):
        assert isinstance(exact, TopK | TopBanded)
        both = (found.log_probs > UNUSED) & (exact.log_probs > UNUSED)  # of nuclei one may need a word more
        yield found.log_probs[both].double(), exact.log_probs[both].double()
    else:
        yield _numbers(key, found, batch, teacher), _numbers(key, exact, batch, teacher)


def _numbers(key: FeatureKey, value: Value, batch: Batch, teacher: TeacherPass) -> Tensor:
    """The numbers of ``value`` that mean something, in float64."""
    if isinstance(value, Words):
        return value.logits.double()
    assert isinstance(value, Tensor)
    if key.site in PAIRWISE:
        assert key.layer is not None
        pairs = pair_mask(batch, teacher.loaded.shape, key.layer) & batch.mask[:, None, :, None]
        return value.double().masked_select(pairs)
    if key.positions == "all":
        return value.double()[batch.mask]
    return value.double()
