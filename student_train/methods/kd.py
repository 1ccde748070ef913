"""Vanilla knowledge distillation from task logits.

Shapes: B rows, C classes.
"""

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from online.batch import Batch, Features
from store.shape import ModelShape
from student_train.methods.base import Method, Stages, Temperature, Terms, check_equal
from student_train.methods.losses import group_log_softmax, kl, vectors
from student_train.methods.task_loss import answer_count, label_count, label_loss, task_key


class KD(Method):
    """alpha T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + (1 - alpha) CE(y, z_s).

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531, section 2. The factor
    T^2 keeps the size of the soft gradient; several toolkits leave it out, so their alphas do not carry over. Choices
    take the softmax over a group's rows, token classification the labelled tokens. Scores (one label) have no softmax:
    alpha (z_s - z_t)^2 + (1 - alpha) (z_s - y)^2. ``alpha: 1`` needs no labels; with ``temperature: 1`` that is
    Pre-trained Distillation (Turc et al. 2019, arXiv 1908.08962) and TinyBERT's prediction phase.

    Terms ``soft`` (rows, groups or tokens) and ``hard`` (those with a label).
    """

    paper = "Hinton, Vinyals, Dean 2015, arXiv 1503.02531"
    stages: ClassVar[Stages] = {"task": ("soft", "hard")}
    accepts = "any with the teacher's task head"

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        alpha: Annotated[float, Field(ge=0, le=1)] = 0.5,
        temperature: Temperature = 2.0,
    ) -> None:
        key = task_key(student)
        check_equal("heads", student.head, teacher.head)
        check_equal("numbers of labels", student.labels, teacher.labels)
        super().__init__({key}, {key} if alpha else (), reads_labels=alpha < 1)
        self.key, self.shape, self.alpha, self.temperature = key, student, alpha, temperature

    def counts(self, batch: Batch) -> Terms:
        terms = {}
        if self.alpha:
            terms["soft"] = answer_count(batch, self.shape)
        if self.alpha < 1:
            terms["hard"] = label_count(batch, self.shape)
        return terms

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        logits, terms = vectors(student, self.key, batch), {}
        if self.alpha:
            answers = vectors(teacher, self.key, batch)
            terms["soft"] = self.alpha * soft_loss(logits, answers, batch, self.shape, self.now(self.temperature))
        if self.alpha < 1:
            terms["hard"] = (1 - self.alpha) * label_loss(logits, batch, self.shape)
        return terms


def soft_loss(student: Tensor, teacher: Tensor, batch: Batch, shape: ModelShape, temperature: float) -> Tensor:
    """0-d sum over ``answer_count`` rows, groups or tokens of T^2 KL between task logits, or of the squared difference of scores."""
    if shape.head == "multiple_choice":
        log_p_B, log_q_B = (group_log_softmax(z.squeeze(-1) / temperature, batch.groups) for z in (teacher, student))
        return temperature**2 * (log_p_B.exp() * (log_p_B - log_q_B)).sum()
    if shape.labels == 1:
        return (student - teacher).square().sum()
    return kl(student, teacher, temperature).sum()
