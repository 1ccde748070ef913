"""RAIL-KD: inner blocks against inner blocks of the teacher that are drawn anew in every epoch.

Shapes: B rows, L layers (one with ``concatenated``), W width.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from online.batch import Batch, Features
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods.base import Method, Stages, Terms
from student_train.methods.losses import unit_count, vectors


class RAILKD(Method):
    """sum_i || u(W_s m_s(i)) - u(W_t m_t(S_i)) ||^2, m the mean of a block's hidden states over tokens, u(x) = x / ||x||.

    Haidar, Anchuri, Rezagholizadeh, Ghaddar, Langlais, Poupart, "RAIL-KD: RAndom Intermediate Layer Mapping for Knowledge
    Distillation", Findings of NAACL 2022, arXiv 2109.10164. S holds N_s - 1 of the teacher's blocks 1 to N_t - 1, in their
    order, drawn anew in every epoch (a resumed run draws the same again): the store keeps all of them, one vector a row
    and block. W_s and W_t project to ``width`` numbers, without bias, are shared by all layers, and both are learned. With
    ``concatenated`` (the paper's RAIL-KD^c) the layers are joined to one vector before a single pair of projections.

    The paper's total, a third each of CE, KD and this term (every layer's alpha_i is 1), is this method beside ``kd``. Both
    projections could shrink what they compare to one point: keep ``kd`` beside it. GLMKD averages over padding, too,
    sums over the batch, and leaves the layers as they were first drawn when it pretrains.

    Term ``hidden``: sum over rows and layers; the squared distance of unit vectors, 2 - 2 cos, is no mean over width.
    """

    paper = "Haidar, Anchuri, Rezagholizadeh, Ghaddar, Langlais, Poupart 2022, arXiv 2109.10164"
    stages: ClassVar[Stages] = {"task": ("hidden", "soft", "hard")}
    kinds = frozenset({"reads intermediate features", "reads other features as it goes", "has parameters of its own"})
    accepts = "2 or more blocks, at most as many as the teacher's; any width"

    def __init__(
        self, student: ModelShape, teacher: ModelShape, *, concatenated: bool = False, width: Annotated[int, Field(ge=1)] = 128
    ) -> None:
        if not 2 <= student.layers <= teacher.layers:
            raise ValueError(
                f"expected a student of 2 blocks to the teacher's {teacher.layers}, found {student.layers}: each of its inner blocks "
                "needs an inner block of the teacher"
            )
        student_keys, teacher_keys = (
            [FeatureKey("hidden", block, "mean") for block in range(1, shape.layers)] for shape in (student, teacher)
        )
        super().__init__(student_keys, teacher_keys)
        self.of_student, self.of_teacher, self.concatenated = student_keys, teacher_keys, concatenated
        joined = len(student_keys) if concatenated else 1
        self.student_projection = nn.Linear(joined * student.width, width, bias=False)
        self.teacher_projection = nn.Linear(joined * teacher.width, width, bias=False)

    def counts(self, batch: Batch) -> Terms:
        return {"hidden": unit_count(batch, "mean")}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        student_BLW = F.normalize(self.student_projection(self._layers(student, self.of_student, batch)), dim=-1)
        teacher_BLW = F.normalize(self.teacher_projection(self._layers(teacher, self._drawn(), batch)), dim=-1)
        return {"hidden": (student_BLW - teacher_BLW).square().sum()}

    def _drawn(self) -> list[FeatureKey]:
        """The teacher's features of this epoch."""
        epoch = self.moment.epoch
        chosen = self.moment.draws("rail_kd", epoch).choice(len(self.of_teacher), len(self.of_student), replace=False)
        return [self.of_teacher[number] for number in sorted(chosen.tolist())]

    def _layers(self, features: Features, keys: list[FeatureKey], batch: Batch) -> Tensor:
        values_BLW = torch.stack([vectors(features, key, batch) for key in keys], 1)
        return values_BLW.flatten(1)[:, None] if self.concatenated else values_BLW
