"""Sentence embeddings: pooled vectors, and the similarities of the sentences of a batch.

Shapes: B rows, R rows of all ranks, W width.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from online.batch import Batch, Features
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.gather import gathered
from student_train.methods.base import Method, Stages, Terms, Weight, check_block, check_weights
from student_train.methods.losses import cosine, mse, projection, unit_count, vectors


class Sentence(Method):
    """Distance of pooled vectors u_s W and u_t: 1 - cos, squared difference, and that of the cosines between sentences.

    ``mse`` is Reimers, Gurevych, "Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation",
    EMNLP 2020, arXiv 2004.09813, equation 1, with a mean over width. ``similarity`` compares the cosine matrices of the batch
    as Tung, Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv 1907.09682, compares its Gram
    matrices (theirs are normalised by row): for each i the mean over j != i of (cos_s(i, j) - cos_t(i, j))^2. It needs no equal widths and
    no W, and depends on which rows share a micro-batch. W is learned, and only where the widths differ.

    ``student_layer`` and ``teacher_layer`` choose a hidden state (0 is the embedding output); unset, the final one.

    Terms ``cosine``, ``mse`` and ``similarity`` (rows).
    """

    paper = "Reimers, Gurevych 2020, arXiv 2004.09813; Tung, Mori 2019, arXiv 1907.09682"
    stages: ClassVar[Stages] = {"transfer": ("hidden",)}
    kinds = frozenset({"reads intermediate features", "has parameters of its own", "compares rows of a batch"})
    accepts = "any; a projection is learned where widths differ"

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        pooling: Literal["mean", "first", "last"] = "mean",
        student_layer: Annotated[int, Field(ge=0)] | None = None,
        teacher_layer: Annotated[int, Field(ge=0)] | None = None,
        cosine: Weight = 1.0,
        mse: Weight = 0.0,
        similarity: Weight = 0.0,
    ) -> None:
        check_weights("sentence", cosine, mse, similarity)
        check_block("student_layer", "student", student_layer or 0, student, lowest=0)
        check_block("teacher_layer", "teacher", teacher_layer or 0, teacher, lowest=0)
        student_key, teacher_key = (
            FeatureKey("final" if layer is None else "hidden", layer, pooling) for layer in (student_layer, teacher_layer)
        )
        super().__init__({student_key}, {teacher_key})
        self.student_key, self.teacher_key = student_key, teacher_key
        self.cosine, self.mse, self.similarity = cosine, mse, similarity
        self.least_rows = 2 if similarity else 1
        self.projection = projection(student.width, teacher.width) if cosine or mse else None

    def counts(self, batch: Batch) -> Terms:
        rows = unit_count(batch, "row")
        terms = {"cosine": rows} if self.cosine else {}
        if self.mse:
            terms["mse"] = rows
        if self.similarity:
            terms["similarity"] = rows
        return terms

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        student_BW, teacher_BW, terms = vectors(student, self.student_key, batch), vectors(teacher, self.teacher_key, batch), {}
        if self.projection is not None:
            projected_BW = self.projection(student_BW)
            if self.cosine:
                terms["cosine"] = self.cosine * cosine(projected_BW, teacher_BW).sum()
            if self.mse:
                terms["mse"] = self.mse * mse(projected_BW, teacher_BW).sum()
        if self.similarity:
            student_BR, teacher_BR = (_cosines(x_BW, self.training) for x_BW in (student_BW, teacher_BW))
            squares_BR = (student_BR - teacher_BR).square()  # 0 between a row and itself
            terms["similarity"] = self.similarity * squares_BR.sum() / max(1, squares_BR.shape[1] - 1)
        return terms


def _cosines(x_BW: Tensor, training: bool) -> Tensor:
    """[B, R] cosines of each row with all rows of all ranks."""
    unit_BW = F.normalize(x_BW, dim=-1)
    return unit_BW @ gathered(unit_BW, training).T
