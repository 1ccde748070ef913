"""Measure a student on held-out rows: the phase's metrics, agreement with a teacher, and the terms of its methods.

Runs in one process (rank 0 of several), without autocast, on masking copy 0.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from online.batch import Batch, Features
from online.capture import Capture
from online.collate import collate
from online.models import forward
from online.teacher import Teacher, Teachers
from store.features import FeatureKey
from store.filters import Where
from store.pool import pools
from store.reader import Store
from store.together import PassName
from student_train.bundle import Bundle
from student_train.metrics import COLUMNS, METRICS, Columns, student_keys
from student_train.translation import translated

BATCH_ROWS = 32


@dataclass(frozen=True)
class HeldOut:
    """Rows to measure on."""

    store: Store
    rows: NDArray[np.int64]
    """[rows] their numbers; groups are whole and stand together."""
    teacher: Teacher | Teachers | None
    """Answers what the metrics compare with, and what the methods read where ``taught``."""
    taught: bool
    """Whether the methods that learn from a teacher are measured."""
    prefix: str
    """In front of the names of its scores."""
    compared: str = ""
    """Name of the teacher that metrics compare with."""


def held_out_rows(
    store: Store, split: str, limit: int | None, where: Where | None = None, pass_name: PassName | None = None
) -> NDArray[np.int64]:
    """Rows of ``split`` in their order, at most ``limit`` (a group is never cut: the last one may go over it).

    Args:
        where: Only those that meet it; ``pass_name`` is the teacher that it is about.

    Raises:
        ValueError: the split is unknown or empty, or none of its rows meets ``where``.
    """
    pool = pools(store, split, where, pass_name)[0]
    rows = pool.take(np.arange(len(pool) if limit is None else min(limit, len(pool))))
    if not len(rows):
        raise ValueError(f"{store.path}: split {split!r} has no rows to measure on")
    if limit is not None and limit < len(rows):
        groups = store.rows.at(rows).group
        rows = rows[: int(np.flatnonzero(groups == groups[limit - 1])[-1]) + 1]
    return rows


def evaluate(bundle: Bundle, metrics: Sequence[str], held_out: Sequence[HeldOut]) -> dict[str, float]:
    """Score -> value over all ``held_out``: each metric, each loss term (weight * mean) as ``method/term``, and ``loss``, their sum.

    The student is put into eval mode and left in the mode it was in; no random number is drawn.
    """
    return answered(bundle, metrics, held_out)[0]


def answered(bundle: Bundle, metrics: Sequence[str], held_out: Sequence[HeldOut]) -> tuple[dict[str, float], list[Columns]]:
    """The scores, and the columns of each of ``held_out`` that the metrics were computed from."""
    training = bundle.training
    bundle.eval()
    try:
        scores: dict[str, float] = {}
        columns = []
        for data in held_out:
            found, of_data = _scores(bundle, metrics, data)
            scores |= {f"{data.prefix}{name}": value for name, value in found.items()}
            columns.append(of_data)
        return scores, columns
    finally:
        bundle.train(training)


@torch.no_grad()
def _scores(bundle: Bundle, metrics: Sequence[str], data: HeldOut) -> tuple[dict[str, float], Columns]:
    shape = bundle.loaded.shape
    methods = bundle.taking_part(data.taught)
    keys = student_keys(metrics, shape).union(*(method.student_keys for method in methods.values()))
    gathered: dict[str, list[Tensor]] = {column: [] for name in metrics for column in METRICS[name].columns}
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for batch, student, teacher in looks(bundle, keys, data):
        compared = {key.of(""): value for key, value in teacher.items() if key.pass_name == data.compared}
        for column, parts in gathered.items():
            parts.append(COLUMNS[column].gather(student, compared, batch, shape).double().cpu())
        for name, count in bundle.counts(batch, data.taught).items():
            counts[name] = counts.get(name, 0.0) + count
        for name, method in methods.items():
            for term, total in method(student, bundle.of_teacher(name, teacher), batch).items():
                sums[f"{name}/{term}"] = sums.get(f"{name}/{term}", 0.0) + float(total) * bundle.weight(name)
    columns = {column: torch.cat(parts).numpy() for column, parts in gathered.items()}
    scores = {name: METRICS[name].compute(*(columns[column] for column in METRICS[name].columns)) for name in metrics}
    terms = {name: total / counts[name] for name, total in sums.items() if counts[name] > 0}
    return {**scores, **({"loss": sum(terms.values())} if terms else {}), **terms}, columns


def looks(bundle: Bundle, keys: Iterable[FeatureKey], data: HeldOut) -> Iterator[tuple[Batch, Features, Features]]:
    """Batch after batch of ``data``, what the student, as it is, has of ``keys``, and what the teachers answer, under their names."""
    device = next(bundle.student.parameters()).device
    for rows in batches(data):
        batch = collate(data.store, rows).to(device)
        teacher: Features = {} if data.teacher is None else data.teacher.features(batch, data.teacher.fetch(rows))
        batch, teacher = translated(bundle.loaded, batch, teacher)
        with Capture(bundle.loaded, keys) as capture:
            forward(bundle.loaded, batch)
        yield batch, capture.features(batch), teacher


def batches(data: HeldOut) -> Iterator[NDArray[np.int64]]:
    """About BATCH_ROWS rows at a time, cut between groups."""
    groups = data.store.rows.at(data.rows).group
    starts = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)]
    first = 0
    for end, following in zip(starts[1:], [*starts[2:], None], strict=True):
        if following is None or following - first > BATCH_ROWS:
            yield data.rows[first:end]
            first = end
