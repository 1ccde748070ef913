"""Universal-KD: inner blocks compared by what a linear classifier makes of them.

Shapes: B rows, L teacher blocks, C classes.
"""

from typing import ClassVar, Literal

import torch
from torch import nn

from online.batch import Batch, Features
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods.base import Method, Stages, Terms, row_token
from student_train.methods.losses import attended, kl, unit_count, vectors
from student_train.methods.task_loss import label_count, label_loss


class UniversalKD(Method):
    """sum_i KL(softmax(c_i) || softmax(s_i)), c_i = sum_j a_ij t_j, a_ij = softmax_j <s_i, t_j>, of pseudo-logits s and t of inner blocks.

    Wu, Rezagholizadeh, Ghaddar, Haidar, Ghodsi, "Universal-KD: Attention-based Output-Grounded Intermediate Layer
    Knowledge Distillation", EMNLP 2021, 2021.emnlp-main.603; here its variant IL (intermediate layers). t_j is a linear classifier of
    the CLS state after teacher block j, of 1 to N_t - 1, and s_i one of the student's after block i, of 1 to N_s - 1; all are
    dropped afterwards. Two phases:

    - ``stage: classifiers``: the teacher's classifiers learn the labels; the student is neither run nor changed.
    - ``stage: distil``: they stay as ``carry`` brings them, and the student learns, with classifiers of its own. Gradient flows through
      a_ij as well (unlike alp_kd, arXiv 2012.14022, there is no detach).

    The paper's total is this method beside ``kd`` on the logits; the two phases and the weights (GLMKD's: 0.5 and 0.5) are
    unverified. GLMKD deviates far: it projects to a hidden width instead of classes and trains the teacher's projections by
    this KL alone, so that nothing grounds them in labels. Causal students read the last token.

    Terms ``classifiers`` (labelled rows, sum over teacher blocks) or ``pseudo`` (rows, sum over student blocks).
    """

    paper = "Wu, Rezagholizadeh, Ghaddar, Haidar, Ghodsi 2021, 2021.emnlp-main.603"
    stages: ClassVar[Stages] = {"classifiers": ("hard",), "distil": ("hidden", "soft", "hard")}
    kinds = frozenset({"reads intermediate features", "has parameters of its own", "trains in several phases"})
    accepts = "classification of rows into 2 or more classes; 2 or more blocks, any width"

    def __init__(self, student: ModelShape, teacher: ModelShape, *, stage: Literal["classifiers", "distil"]) -> None:
        if student.head != "classification" or student.labels < 2:
            raise ValueError(
                f"grounds blocks in the classes of rows: expected a student with head classification and 2 or more labels, found head "
                f"{student.head} with {student.labels}; pkd, alp_kd and rail_kd need no classes"
            )
        if student.layers < 2 or teacher.layers < 2:
            raise ValueError(f"compares inner blocks: expected 2 or more blocks on both sides, found {student.layers} and {teacher.layers}")
        at = row_token(student)
        student_keys, teacher_keys = ([FeatureKey("hidden", block, at) for block in range(1, shape.layers)] for shape in (student, teacher))
        distils = stage == "distil"
        super().__init__(student_keys if distils else (), teacher_keys, reads_labels=not distils)
        self.must_carry = distils
        self.of_student, self.of_teacher, self.shape, self.stage, self.positions = student_keys, teacher_keys, student, stage, at
        # both phases have both, so that one carries on the parameters of the other by name
        self.teacher_classifiers = nn.ModuleList(nn.Linear(teacher.width, student.labels) for _ in teacher_keys)
        self.student_classifiers = nn.ModuleList(nn.Linear(student.width, student.labels) for _ in student_keys)
        (self.teacher_classifiers if distils else self.student_classifiers).requires_grad_(False)

    def counts(self, batch: Batch) -> Terms:
        if self.stage == "classifiers":
            return {"classifiers": label_count(batch, self.shape)}
        return {"pseudo": unit_count(batch, self.positions)}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        teacher_LBC = [
            classifier(vectors(teacher, key, batch)) for classifier, key in zip(self.teacher_classifiers, self.of_teacher, strict=True)
        ]
        if self.stage == "classifiers":
            return {"classifiers": torch.stack([label_loss(logits_BC, batch, self.shape) for logits_BC in teacher_LBC]).sum()}
        teacher_BLC, losses = torch.stack(teacher_LBC, 1), []
        for classifier, key in zip(self.student_classifiers, self.of_student, strict=True):
            student_BC = classifier(vectors(student, key, batch))
            losses.append(kl(student_BC, attended(student_BC, teacher_BLC)).sum())
        return {"pseudo": torch.stack(losses).sum()}
