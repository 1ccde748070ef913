"""PKD: one normalised token vector of each inner block.

Shapes: B rows, W width.
"""

from typing import ClassVar, Literal

import torch
from torch.nn import functional as F

from online.batch import Batch, Features
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods.base import Method, Stages, Terms, check_block, row_token
from student_train.methods.losses import mse, projection, unit_count, vectors


class PKD(Method):
    """sum_l MSE(u(h_s), u(h_t)) of the CLS states of inner blocks, u(h) = h / ||h||.

    Sun, Cheng, Gan, Liu, "Patient Knowledge Distillation for BERT Model Compression", EMNLP-IJCNLP 2019, arXiv
    1908.09355, section 3.2. ``skip`` maps student block l to teacher block l N_t / N_s (12 -> 6 blocks: 2, 4, ... 10),
    ``last`` to the blocks before the last (7, 8, ... 11); both leave out the last block of either model, whose state the logits
    teach already. Pairs may name any blocks. ``normalise: false`` is in the published search too.

    The paper's total, (1 - a) CE + a KD + beta PT, is this method beside ``kd``. Its PT is a sum of squared norms; the authors' code,
    whose betas are published (10 to 1000), takes the mean over M layers, rows and width, which is ``weight: beta / M`` here.
    That code also divides the KL by the number of classes. GLMKD sums layers as here, and steps by int(N_t / N_s).

    The authors' code reads the teacher's logits and CLS states from a file dumped once, and so keeps rows in file order; a
    store needs no such order. W is learned where the widths differ, which the paper does not cover. Causal students read the last token.

    Term ``patience``: sum over rows and layers, mean over width.
    """

    paper = "Sun, Cheng, Gan, Liu 2019, arXiv 1908.09355"
    stages: ClassVar[Stages] = {"task": ("hidden", "soft", "hard")}
    kinds = frozenset({"reads intermediate features", "has parameters of its own"})
    accepts = "any; a projection is learned where widths differ"

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        layers: Literal["skip", "last"] | list[tuple[int, int]] = "skip",
        normalise: bool = True,
    ) -> None:
        at = row_token(student)
        pairs = [(FeatureKey("hidden", s, at), FeatureKey("hidden", t, at)) for s, t in inner_pairs(layers, student, teacher)]
        super().__init__((s for s, _ in pairs), (t for _, t in pairs))
        self.pairs, self.positions, self.normalise = pairs, at, normalise
        self.projection = projection(student.width, teacher.width)

    def counts(self, batch: Batch) -> Terms:
        return {"patience": unit_count(batch, self.positions)}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        losses = []
        for s, t in self.pairs:
            student_BW, teacher_BW = self.projection(vectors(student, s, batch)), vectors(teacher, t, batch)
            if self.normalise:
                student_BW, teacher_BW = F.normalize(student_BW, dim=-1), F.normalize(teacher_BW, dim=-1)
            losses.append(mse(student_BW, teacher_BW).sum())
        return {"patience": torch.stack(losses).sum()}


def inner_pairs(layers: Literal["skip", "last"] | list[tuple[int, int]], student: ModelShape, teacher: ModelShape) -> list[tuple[int, int]]:
    """Pairs (student block, teacher block), counted from 1."""
    inner = range(1, student.layers)
    if layers == "skip":
        pairs = [(s, s * teacher.layers // student.layers) for s in inner]
    elif layers == "last":
        pairs = [(s, teacher.layers - student.layers + s) for s in inner]
    else:
        pairs = list(layers)
    if not pairs:
        raise ValueError(
            f"layers: expected at least one pair of blocks; skip and last leave out the last of the student's, which has {student.layers}"
        )
    for s, t in pairs:
        check_block("layers", "student", s, student)
        check_block("layers", "teacher", t, teacher)
    return pairs
