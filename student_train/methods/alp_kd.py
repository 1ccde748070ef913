"""ALP-KD: each student block learns from a mixture of teacher blocks.

Shapes: B rows, L teacher blocks, W width.
"""

from typing import ClassVar

import torch

from online.batch import Batch, Features
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods.base import Method, Stages, Terms, row_token
from student_train.methods.losses import attended, mse, projection, unit_count, vectors


class ALPKD(Method):
    """sum_i MSE(h_s(i), C_i), C_i = sum_j a_ij h_t(j), a_ij = softmax_j <h_s(i), h_t(j)>, of CLS states after all blocks of both models.

    Passban, Wu, Rezagholizadeh, Liu, "ALP-KD: Attention-Based Layer Projection for Knowledge Distillation", AAAI 2021,
    arXiv 2012.14022. The attention has no parameters (``universal_kd`` has). Gradient flows through a_ij into the
    student, too; ``detach`` stops it there. With ``buckets`` student block i attends to its own stretch of teacher blocks
    only, (i - 1) N_t / N_s + 1 to i N_t / N_s.

    The paper's total, beta CE + eta KD + lambda ALP, is this method with weight lambda beside ``kd``; beta = 1 - eta - lambda is
    unverified. In GLMKD the weight is read from nowhere and is 1; the code of Wang et al. 2023 counts embeddings as layers
    and averages over them. W, which projects the student's states before both steps, is ours, and learned only where the widths
    differ. Causal students read the last token.

    Term ``hidden``: sum over rows and student blocks, mean over width.
    """

    paper = "Passban, Wu, Rezagholizadeh, Liu 2021, arXiv 2012.14022"
    stages: ClassVar[Stages] = {"task": ("hidden", "soft", "hard")}
    kinds = frozenset({"reads intermediate features", "has parameters of its own"})
    accepts = "any; a projection is learned where widths differ"

    def __init__(self, student: ModelShape, teacher: ModelShape, *, buckets: bool = False, detach: bool = False) -> None:
        if buckets and teacher.layers < student.layers:
            raise ValueError(
                f"buckets: expected a teacher with at least as many blocks as the student's {student.layers}, found {teacher.layers}; "
                "without buckets every block sees all"
            )
        at = row_token(student)
        student_keys, teacher_keys = (
            [FeatureKey("hidden", block, at) for block in range(1, shape.layers + 1)] for shape in (student, teacher)
        )
        super().__init__(student_keys, teacher_keys)
        self.of_student, self.of_teacher, self.positions, self.detach = student_keys, teacher_keys, at, detach
        self.seen = [
            slice(i * teacher.layers // student.layers, (i + 1) * teacher.layers // student.layers) if buckets else slice(None)
            for i in range(student.layers)
        ]
        """Of each student block: the teacher blocks that it attends to."""
        self.projection = projection(student.width, teacher.width)

    def counts(self, batch: Batch) -> Terms:
        return {"hidden": unit_count(batch, self.positions)}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        teacher_BLW = torch.stack([vectors(teacher, key, batch) for key in self.of_teacher], 1)
        losses = []
        for key, seen in zip(self.of_student, self.seen, strict=True):
            student_BW = self.projection(vectors(student, key, batch))
            target_BW = attended(student_BW.detach() if self.detach else student_BW, teacher_BLW[:, seen])
            losses.append(mse(student_BW, target_BW).sum())
        return {"hidden": torch.stack(losses).sum()}
