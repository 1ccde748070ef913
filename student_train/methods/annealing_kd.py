"""Annealing-KD: task logits that grow to the teacher's.

Shapes: B rows (labelled tokens for token classification), C classes.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from online.batch import Batch, Features
from store.shape import ModelShape
from student_train.methods.base import Method, Stages, Terms, check_equal
from student_train.methods.losses import vectors
from student_train.methods.task_loss import answer_count, task_key
from student_train.moment import Moment
from student_train.schedule import Schedule, at


class AnnealingKD(Method):
    """|| z_s - Phi(T) z_t ||^2 with Phi(T) = 1 - (T - 1) / T_max, T falling from T_max to 1: phase I of Annealing-KD.

    Jafari, Rezagholizadeh, Sharma, Ghodsi, "Annealing Knowledge Distillation", EACL 2021, arXiv 2104.07163, section 3.
    Phi rises in ``levels`` = T_max equal stretches from 1 / T_max to 1: stretches of whole epochs, or with ``by: step`` of steps. A
    phase of fewer epochs than levels has as many levels as epochs, so that its last one sees the teacher's own logits. T_max
    is unverified: 7 for text, 10 in the authors' code. There is no softmax, no T^2 and no label. Phase II is ``task_loss``,
    from phase I's best weights.

    The distance is the paper's sum over classes; the authors' code and GLMKD take the mean. GLMKD goes by steps. Choices
    count once a group, token classification its labelled tokens, scores as they are.

    Term ``logits`` (rows, groups or tokens).
    """

    paper = "Jafari, Rezagholizadeh, Sharma, Ghodsi 2021, arXiv 2104.07163"
    stages: ClassVar[Stages] = {"phase I": ("soft",), "phase II": ("hard",)}
    kinds = frozenset({"changes its loss as it goes", "trains in several phases"})
    accepts = "any with the teacher's task head"

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        levels: Annotated[int, Field(ge=1)] = 7,
        by: Literal["epoch", "step"] = "epoch",
    ) -> None:
        key = task_key(student)
        check_equal("heads", student.head, teacher.head)
        check_equal("numbers of labels", student.labels, teacher.labels)
        super().__init__({key}, {key})
        self.key, self.shape, self.levels, self.by = key, student, levels, by

    def counts(self, batch: Batch) -> Terms:
        return {"logits": answer_count(batch, self.shape)}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        phi = annealed(self.levels, self.by, self.moment)
        return {"logits": (vectors(student, self.key, batch) - phi * vectors(teacher, self.key, batch)).square().sum()}


def annealed(levels: int, by: Literal["epoch", "step"], moment: Moment) -> float:
    """Phi at ``moment``: 1 / levels, 2 / levels, ... 1 in equal stretches of epochs (at least one each) or steps."""
    return at(Schedule(kind="annealing", levels=min(levels, moment.epochs) if by == "epoch" else levels, by=by), moment)
