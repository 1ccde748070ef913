"""All larger models of a chain of assistants at once.

Shapes: U decisions (rows, labelled tokens or groups of choices).
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from online.batch import Batch, Features
from store.shape import ModelShape
from student_train.methods.base import Method, Stages, TeacherShapes, Temperature, Terms
from student_train.methods.decisions import shared_task, soft_losses
from student_train.methods.losses import vectors
from student_train.methods.task_loss import answer_count, label_count, label_loss


class DGKD(Method):
    """alpha sum_{j survives} T^2 KL(softmax(z_j / T) || softmax(z_s / T)) + (1 - alpha) CE(y, z_s).

    Son, Na, Choi, Hwang, "Densely Guided Knowledge Distillation using Multiple Teacher Assistants", ICCV 2021, arXiv
    2009.08825: each model of a chain from the teacher down (recipes/dgkd) learns from all models before it, of which each
    survives a step with probability ``survival``; where none does, only labels are learned. ``drop`` leaves out so many
    instead, as the authors' code (one by default there). All ranks and micro-batches of a step draw alike; all teachers
    answer when the student is measured. ``combine: mean`` divides by the number that survives: with ``survival: 1`` that is
    plain distillation from the average of several teachers' losses.

    The authors' code has T 5, alpha 1 and the hard loss once, however many teachers there are; its KL is divided by the
    number of classes too. Survival 0.75 and alpha 0.5 are what GLMD's authors took for this method (Tan et al. 2023, arXiv
    2306.06625; their soft loss lacks T^2); those of the paper's own tables are unverified. Scores (one label) are compared by
    squared difference. ``alpha: 1`` needs no labels.

    Terms ``soft`` (rows, groups or tokens) and ``hard`` (those with a label).
    """

    paper = "Son et al. 2021, ICCV, arXiv 2009.08825"
    stages: ClassVar[Stages] = {"task": ("soft", "hard")}
    kinds = frozenset({"changes its loss as it goes", "learns from several teachers", "trains in several phases"})
    accepts = "any with the teachers' task head"
    several = True

    def __init__(
        self,
        student: ModelShape,
        teachers: TeacherShapes,
        *,
        alpha: Annotated[float, Field(ge=0, le=1)] = 0.5,
        temperature: Temperature = 5.0,
        survival: Annotated[float, Field(gt=0, le=1)] = 0.75,
        drop: Annotated[int, Field(ge=0)] = 0,
        combine: Literal["sum", "mean"] = "sum",
    ) -> None:
        key = shared_task(student, teachers)
        if drop >= len(teachers):
            raise ValueError(f"drop: expected fewer than the {len(teachers)} teachers, found {drop}")
        super().__init__({key}, {key.of(name) for name in teachers} if alpha else (), reads_labels=alpha < 1)
        self.key, self.shape, self.teachers = key, student, tuple(teachers)
        self.alpha, self.temperature, self.survival, self.drop, self.combine = alpha, temperature, survival, drop, combine

    def counts(self, batch: Batch) -> Terms:
        terms = {"soft": answer_count(batch, self.shape)} if self.alpha else {}
        if self.alpha < 1:
            terms["hard"] = label_count(batch, self.shape)
        return terms

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        logits, terms = vectors(student, self.key, batch), {}
        if self.alpha:
            terms["soft"] = self.alpha * self._soft(logits, teacher, batch)
        if self.alpha < 1:
            terms["hard"] = (1 - self.alpha) * label_loss(logits, batch, self.shape)
        return terms

    def survivors(self) -> Sequence[str]:
        """The teachers that this step learns from."""
        if not self.training:
            return self.teachers
        draws = self.moment.draws("dgkd", self.moment.step)
        if self.drop:
            dropped = draws.permutation(len(self.teachers))[: self.drop].tolist()
            return [name for number, name in enumerate(self.teachers) if number not in dropped]
        kept = (draws.random(len(self.teachers)) < self.survival).tolist()
        return [name for name, stays in zip(self.teachers, kept, strict=True) if stays]

    def _soft(self, logits: Tensor, teacher: Features, batch: Batch) -> Tensor:
        names, temperature = self.survivors(), self.now(self.temperature)
        losses = [soft_losses(logits, vectors(teacher, self.key.of(name), batch), batch, self.shape, temperature).sum() for name in names]
        total = torch.stack([logits.sum() * 0, *losses]).sum()  # the first for a step without survivors
        return total / max(1, len(losses)) if self.combine == "mean" else total
