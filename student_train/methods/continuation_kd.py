"""Continuation-KD: from annealed logits within a margin to hard labels.

Shapes: B rows (labelled tokens for token classification), C classes, G groups of choices.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from online.batch import Batch, Features
from store.shape import ModelShape
from student_train.methods.annealing_kd import annealed
from student_train.methods.base import Method, Stages, Terms, check_equal
from student_train.methods.losses import vectors
from student_train.methods.task_loss import answer_count, label_count, label_loss, task_key
from student_train.schedule import Schedule


class ContinuationKD(Method):
    """psi CE(y, z_s) + (1 - psi) max(0, || z_s - phi z_t ||^2 - m phi), the hinge of each row by itself.

    Jafari, Kobyzev, Rezagholizadeh, Poupart, Ghodsi, "Continuation KD: Improved Knowledge Distillation through the Lens of
    Continuation Optimization", Findings of EMNLP 2022, arXiv 2212.05998. phi is that of ``annealing_kd``, with the
    paper's T_max = 10 for language understanding. psi is its i / 40 in epoch i of 30 up to i = 20, then 1: 0 to 1/2 over the
    first two thirds of the phase, whatever its length, and labels alone in the last third. Both change between epochs, or
    with ``by: step`` at every step: take that in phases of few epochs (with fewer than four psi never gets to 1). ``margin`` is
    searched in the paper; 1 is GLMKD's.

    The distance is the paper's sum over classes. GLMKD takes the mean, which makes the margin C times as wide, goes by steps, and
    does not subtract the margin from what exceeds it: the same gradient, another value.

    Terms ``hard`` (labelled rows, groups or tokens) and ``logits`` (rows, groups or tokens).
    """

    paper = "Jafari, Kobyzev, Rezagholizadeh, Poupart, Ghodsi 2022, arXiv 2212.05998"
    stages: ClassVar[Stages] = {"task": ("soft", "hard")}
    kinds = frozenset({"changes its loss as it goes"})
    accepts = "any with the teacher's task head"

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        margin: Annotated[float, Field(ge=0)] = 1.0,
        levels: Annotated[int, Field(ge=1)] = 10,
        by: Literal["epoch", "step"] = "epoch",
    ) -> None:
        key = task_key(student)
        check_equal("heads", student.head, teacher.head)
        check_equal("numbers of labels", student.labels, teacher.labels)
        super().__init__({key}, {key}, reads_labels=True)
        self.key, self.shape, self.margin, self.levels, self.by = key, student, margin, levels, by
        self.psi = Schedule(kind="continuation", by=by)

    def counts(self, batch: Batch) -> Terms:
        return {"hard": label_count(batch, self.shape), "logits": answer_count(batch, self.shape)}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        logits_BC, psi, phi = vectors(student, self.key, batch), self.now(self.psi), annealed(self.levels, self.by, self.moment)
        distance = self._of_answers((logits_BC - phi * vectors(teacher, self.key, batch)).square().sum(-1), batch)
        return {
            "hard": psi * label_loss(logits_BC, batch, self.shape),
            "logits": (1 - psi) * (distance - self.margin * phi).clamp(min=0).sum(),
        }

    def _of_answers(self, distance_B: Tensor, batch: Batch) -> Tensor:
        """[B] as it is, or for choices [G]: a group's logits are one vector."""
        if self.shape.head != "multiple_choice":
            return distance_B
        names_G, group_B = batch.groups.unique_consecutive(return_inverse=True)
        return distance_B.new_zeros(len(names_G)).index_add(0, group_B, distance_B)
