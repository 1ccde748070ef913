"""RKD: distances and angles among the rows of a batch.

Shapes: B rows, R rows of all ranks, W width.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from online.batch import Batch, Features
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.gather import gathered, own
from student_train.methods.angles import angle_cosines, distances
from student_train.methods.base import Method, Stages, Terms, Weight, check_block, check_weights
from student_train.methods.losses import unit_count, vectors


class RKD(Method):
    """Huber losses between the relations of pooled vectors: distances over their mean, and cosines of the angles of triplets.

    Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv 1904.05068, sections 3.2.1 and 3.2.2: for rows i, j, k,
    psi_D(i, j) = ||x_i - x_j|| / mu with mu the mean distance of all pairs, psi_A(i, j, k) = cos of the angle at i between j and k.
    Pairs and triplets are of different rows of the micro-batch, over all ranks; the authors' code also counts those that
    repeat a row, whose loss is 0. Neither widths need agree nor anything be learned. The weights 1 and 2 are those for
    embeddings; the paper's classifiers take 25 and 50 beside the task loss. Triplets take R^3 numbers.

    ``student_layer`` and ``teacher_layer`` choose a hidden state (0 is the embedding output); unset, the final one.

    Terms ``distance`` (rows, mean over the others) and ``angle`` (rows, mean over the pairs of others).
    """

    paper = "Park, Kim, Lu, Cho 2019, arXiv 1904.05068"
    stages: ClassVar[Stages] = {"task": ("hidden", "hard")}
    kinds = frozenset({"reads intermediate features", "compares rows of a batch"})
    accepts = "any heads, any width"

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        pooling: Literal["mean", "first", "last"] = "mean",
        student_layer: Annotated[int, Field(ge=0)] | None = None,
        teacher_layer: Annotated[int, Field(ge=0)] | None = None,
        distance: Weight = 1.0,
        angle: Weight = 2.0,
    ) -> None:
        check_weights("rkd", distance, angle)
        check_block("student_layer", "student", student_layer or 0, student, lowest=0)
        check_block("teacher_layer", "teacher", teacher_layer or 0, teacher, lowest=0)
        student_key, teacher_key = (
            FeatureKey("final" if layer is None else "hidden", layer, pooling) for layer in (student_layer, teacher_layer)
        )
        super().__init__({student_key}, {teacher_key})
        self.student_key, self.teacher_key = student_key, teacher_key
        self.distance, self.angle = distance, angle
        self.least_rows = 3 if angle else 2

    def counts(self, batch: Batch) -> Terms:
        weights = {"distance": self.distance, "angle": self.angle}
        return {term: unit_count(batch, "row") for term, weight in weights.items() if weight}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        (student_BR, student_RR), (teacher_BR, teacher_RR) = (
            _distances(vectors(features, key, batch), self.training)
            for features, key in ((student, self.student_key), (teacher, self.teacher_key))
        )
        others = student_RR.shape[0] - 1
        terms = {}
        if self.distance:
            loss = F.huber_loss(student_BR / _mean(student_RR), teacher_BR / _mean(teacher_RR), reduction="sum")  # 0 from a row to itself
            terms["distance"] = self.distance * loss / max(1, others)
        if self.angle:
            student_BRR, teacher_BRR = (_angles(*found) for found in ((student_BR, student_RR), (teacher_BR, teacher_RR)))
            loss = F.huber_loss(student_BRR, teacher_BRR, reduction="sum")
            terms["angle"] = self.angle * loss / max(1, others * (others - 1))
        return terms


def _distances(x_BW: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """[B, R] from the own rows to those of all ranks, and [R, R] among all."""
    found_RR = distances(gathered(x_BW, training))
    return found_RR[own(x_BW, training)], found_RR


def _angles(near_BR: Tensor, across_RR: Tensor) -> Tensor:
    """[B, R, R] cosines of the angles at the own rows; 0 where one row stands twice in a triplet."""
    cosines_BRR = angle_cosines(near_BR[:, :, None], near_BR[:, None, :], across_RR)
    return cosines_BRR.masked_fill(torch.eye(len(across_RR), dtype=torch.bool, device=across_RR.device), 0)


def _mean(found_RR: Tensor) -> Tensor:
    """0-d mean distance of pairs of rows; 1 where all rows are in one place."""
    rows = len(found_RR)
    mean = found_RR.sum() / max(1, rows * (rows - 1))
    return torch.where(mean > 0, mean, 1)
