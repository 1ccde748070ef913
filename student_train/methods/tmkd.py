"""A header for each teacher beside the student's own."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from online.batch import Batch, Features
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods.base import Method, Stages, TeacherShapes, Terms, row_token
from student_train.methods.decisions import decisions, score_losses, shared_task
from student_train.methods.losses import vectors
from student_train.methods.task_loss import answer_count, label_count, label_loss


class TMKD(Method):
    """(1 - alpha) CE(y, z_s) + alpha sum_i MSE(z_i, W_i h_s + b_i): the student's own head learns labels, a header each teacher's scores.

    Yang, Shou, Gong, Lin, Jiang, "Model Compression with Two-stage Multi-teacher Knowledge Distillation for Web Question
    Answering System", WSDM 2020, arXiv 1910.08381. h_s is the final hidden state of the first token (causal students: of the last;
    token classification: of each labelled token). The paper's first stage is this method on unlabelled rows of the task with
    ``alpha: 1``, its second stage this method on labelled ones, the headers carried over (``carry: PHASE``).

    Headers and the sum over teachers follow a summary of the paper, as does the default of alpha (unverified); scores are logits
    here. The student is exported with its own head alone. The paper averages the headers' answers at inference: headers are
    linear in the same h, so one linear layer with the mean of their W and b, which the phase keeps beside its student, does it.
    GLMD's authors (Tan et al. 2023, arXiv 2306.06625) have no headers, and a hard loss smaller by the number of teachers.

    Terms ``soft`` (rows, groups of choices or labelled tokens; sum over teachers, mean over classes) and ``hard`` (those with a label).
    """

    paper = "Yang et al. 2020, WSDM, arXiv 1910.08381"
    stages: ClassVar[Stages] = {"pretraining": ("soft",), "task": ("soft", "hard")}
    kinds = frozenset({"has parameters of its own", "learns from several teachers", "trains in several phases"})
    accepts = "any with the teachers' task head"
    several = True

    def __init__(self, student: ModelShape, teachers: TeacherShapes, *, alpha: Annotated[float, Field(gt=0, le=1)] = 0.5) -> None:
        key = shared_task(student, teachers)
        read = FeatureKey("final", positions="labels" if student.head == "token_classification" else row_token(student))
        own = {key} if alpha < 1 else set()
        super().__init__({read} | own, {key.of(name) for name in teachers}, reads_labels=alpha < 1)
        self.key, self.read, self.shape, self.alpha = key, read, student, alpha
        self.headers = nn.ModuleDict({f"of-{name}": nn.Linear(student.width, student.labels) for name in teachers})
        self.teachers = tuple(teachers)

    def counts(self, batch: Batch) -> Terms:
        terms = {"soft": answer_count(batch, self.shape)}
        if self.alpha < 1:
            terms["hard"] = label_count(batch, self.shape)
        return terms

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        state, losses = vectors(student, self.read, batch), []
        for name in self.teachers:
            scores, header = vectors(teacher, self.key.of(name), batch), self.headers[f"of-{name}"](state)
            losses.append(score_losses(*(decisions(z, batch, self.shape) for z in (header, scores))).sum())
        terms = {"soft": self.alpha * torch.stack(losses).sum()}
        if self.alpha < 1:
            terms["hard"] = (1 - self.alpha) * label_loss(vectors(student, self.key, batch), batch, self.shape)
        return terms
