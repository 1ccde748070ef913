"""What a phase's probe compares, worked out from shapes and manifests alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from store.features import FeatureKey
from store.manifest import RowsInfo
from store.shape import ModelShape
from student_train.distances import Comparison, comparisons
from student_train.recipe import DataSpec, PhaseSpec


@dataclass(frozen=True)
class ProbePlan:
    """What is compared, where and when."""

    data: DataSpec
    rows: int
    """The first ones of its split."""
    every: int | None
    """Optimiser steps between two looks, beside evaluations, start and end."""
    comparisons: Sequence[Comparison]

    @property
    def teacher_keys(self) -> frozenset[FeatureKey]:
        """What it reads of the teacher."""
        return frozenset(one.teacher_key for one in self.comparisons)


def probe_plan(phase: PhaseSpec, student: ModelShape, teacher: ModelShape | None, rows: RowsInfo | None) -> ProbePlan:
    """The plan of the ``probe`` that ``phase`` has.

    Args:
        teacher: The one that its data's metrics compare with.
        rows: Of the data's store; None where that does not exist yet.

    Raises:
        ValueError: there is no teacher, or the two models do not have what is to be compared.
    """
    spec, data = phase.probe, phase.probed
    assert spec is not None
    assert data is not None
    if teacher is None:
        raise ValueError(f"probe: it compares the student with a teacher: give probe.data, or the data of {data.store}, a pass_name")
    labelled = rows is None or rows.objective != "plain"
    try:
        compared = comparisons(spec.distances, spec.layers, spec.temperatures, student, teacher, labelled)
    except ValueError as error:
        raise ValueError(f"probe: {error}") from None
    return ProbePlan(data, spec.rows, spec.every, compared)
