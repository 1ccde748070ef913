"""What a method is: keys it needs of both sides, and sums of loss terms with their counts."""

from typing import Literal

from torch import Tensor, nn

from online.batch import Batch, Features
from store.features import FeatureKey
from store.shape import ModelShape

Terms = dict[str, Tensor]
"""Name of a term -> 0-d float32."""


class Method(nn.Module):
    """One distillation loss. Options are keyword-only arguments of ``__init__`` with the recipe's names.

    A subclass sets ``student_keys`` and ``teacher_keys`` (no pass name) from the two shapes alone; it never sees a
    model, and does not know where the teacher's features come from. Its parameters train beside the student and never
    reach the exported model.
    """

    student_keys: frozenset[FeatureKey]
    teacher_keys: frozenset[FeatureKey]

    def __init__(self, student: ModelShape, teacher: ModelShape | None) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.student_keys = frozenset()
        self.teacher_keys = frozenset()

    def counts(self, batch: Batch) -> Terms:
        """Term -> how many tokens, rows or pairs of ``batch`` it sums over; known before any forward pass.

        The trainer divides each sum by its count over all ranks and accumulation steps.
        """
        raise NotImplementedError

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        """Term -> weighted sum over ``batch``, differentiable in the student's features; the same names as ``counts``."""
        raise NotImplementedError


LayerMap = Literal["uniform", "last"] | list[tuple[int, int]]
"""Which teacher block each student block learns from: pairs (student, teacher) counted from 1 (0 is the embedding output
where a method reads it), ``uniform`` as TinyBERT (student l from l * N_t / N_s, Jiao et al. 2020) or ``last`` (N_s from N_t)."""


def layer_pairs(layers: LayerMap, student: ModelShape, teacher: ModelShape, lowest: int = 1) -> list[tuple[int, int]]:
    """Pairs (student block, teacher block) that ``layers`` names; ``uniform`` starts at block ``lowest``.

    Raises:
        ValueError: a block is out of range; the message says how many there are.
    """
    if layers == "uniform":
        return [(l, l * teacher.layers // student.layers) for l in range(lowest, student.layers + 1)]
    if layers == "last":
        return [(student.layers, teacher.layers)]
    for pair in layers:
        for side, block, shape in (("student", pair[0], student), ("teacher", pair[1], teacher)):
            if not lowest <= block <= shape.layers:
                raise ValueError(f"layers: the {side} has blocks {lowest} to {shape.layers}, found {block} in {list(pair)}")
    return list(layers)
