"""Several teachers, each trusted where it is right.

Shapes: U decisions (rows, labelled tokens or groups of choices), C classes or choices.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from online.batch import IGNORED, Batch, Features
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods.base import LayerMap, Method, Stages, TeacherShapes, Temperature, Terms, Weight, check_weights, layer_pairs
from student_train.methods.decisions import check_decides, decision_labels, decisions, shared_task
from student_train.methods.losses import mse, soft_ce, unit_count, vectors
from student_train.methods.task_loss import label_count, label_loss


class MTBERT(Method):
    """sum_i [sum_l MSE(H_s, H_i W_il) + CE(p_i, p_s) / (1 + CE(y, p_i))] + CE(y, p_s) over teachers i and pairs of blocks l.

    Wu, Wu, Huang, "One Teacher is Enough? Pre-trained Language Model Distillation from Multiple Teachers", Findings of ACL
    2021, arXiv 2106.01023. p are probabilities, in the soft loss at ``temperature`` (times T^2; the paper's temperature is unverified), and
    CE(y, p_i) is a teacher's own loss on the row: the more it is right, the more it counts. W_il maps the teacher's hidden
    states to the student's width and is learned for each teacher and pair, also where widths agree. Rows without a label
    have no such weight and don't count in ``soft``.

    The paper fine-tunes its teachers together first, with one pooling and prediction layer for all, so that their spaces
    agree; here they are what their passes hold. GLMD's authors (Tan et al. 2023, arXiv 2306.06625) leave that out too, and have one W
    a teacher for all layers.

    Terms ``hidden`` (tokens; sum over teachers and layers, mean over width), ``soft`` (labelled rows, groups or tokens; sum over
    teachers) and ``hard`` (the same).
    """

    paper = "Wu et al. 2021, Findings of ACL, arXiv 2106.01023"
    stages: ClassVar[Stages] = {"task": ("hidden", "soft", "hard")}
    kinds = frozenset({"reads intermediate features", "has parameters of its own", "learns from several teachers"})
    accepts = "classes or choices, any width"
    several = True

    def __init__(
        self,
        student: ModelShape,
        teachers: TeacherShapes,
        *,
        layers: LayerMap = "uniform",
        temperature: Temperature = 1.0,
        hidden: Weight = 1.0,
        soft: Weight = 1.0,
        hard: Weight = 1.0,
    ) -> None:
        check_weights("mt_bert", hidden, soft, hard)
        check_decides(student, "dgkd, which compares scores too")
        key = shared_task(student, teachers)
        pairs = {name: layer_pairs(layers, student, teacher, lowest=0) for name, teacher in teachers.items()} if hidden else {}
        blocks = {FeatureKey("hidden", t).of(name) for name, own in pairs.items() for _, t in own}
        logits = {key.of(name) for name in teachers} if soft else set()
        own_keys = {FeatureKey("hidden", s) for own in pairs.values() for s, _ in own} | ({key} if soft or hard else set())
        super().__init__(own_keys, blocks | logits, reads_labels=bool(soft or hard))
        self.key, self.shape, self.teachers, self.pairs = key, student, tuple(teachers), pairs
        self.temperature, self.hidden, self.soft, self.hard = temperature, hidden, soft, hard
        self.maps = nn.ModuleDict(
            {_map(name, *pair): nn.Linear(teachers[name].width, student.width, bias=False) for name, own in pairs.items() for pair in own}
        )

    def counts(self, batch: Batch) -> Terms:
        terms = {"hidden": unit_count(batch, "all")} if self.hidden else {}
        labelled = label_count(batch, self.shape)
        return terms | ({"soft": labelled} if self.soft else {}) | ({"hard": labelled} if self.hard else {})

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        terms = {}
        if self.hidden:
            terms["hidden"] = self.hidden * self._hidden(student, teacher, batch)
        if self.soft:
            student_UC, losses = decisions(vectors(student, self.key, batch), batch, self.shape), []
            for name in self.teachers:
                teacher_UC = decisions(vectors(teacher, self.key.of(name), batch), batch, self.shape)
                losses.append((self._trust(teacher_UC, batch) * soft_ce(student_UC, teacher_UC, self.now(self.temperature))).sum())
            terms["soft"] = self.soft * torch.stack(losses).sum()
        if self.hard:
            terms["hard"] = self.hard * label_loss(vectors(student, self.key, batch), batch, self.shape)
        return terms

    def _hidden(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        losses = []
        for name, pairs in self.pairs.items():
            for s, t in pairs:
                mapped = self.maps[_map(name, s, t)](vectors(teacher, FeatureKey("hidden", t).of(name), batch))
                losses.append(mse(vectors(student, FeatureKey("hidden", s), batch), mapped).sum())
        return torch.stack(losses).sum()

    def _trust(self, teacher_UC: Tensor, batch: Batch) -> Tensor:
        """[U] 1 / (1 + the teacher's own loss), 0 without a label."""
        labels_U = decision_labels(batch, self.shape)
        loss_U = F.cross_entropy(teacher_UC, labels_U, ignore_index=IGNORED, reduction="none")
        return (labels_U != IGNORED) / (1 + loss_U)


def _map(teacher: str, student_block: int, teacher_block: int) -> str:
    return f"{teacher}-{student_block}-{teacher_block}"
