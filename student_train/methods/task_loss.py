"""Hard labels alone.

Shapes: B rows, N labelled tokens, C classes.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from online.batch import IGNORED, Batch, Features
from online.words import as_words
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods.base import Method, Stages, Terms, check_site
from student_train.methods.lm_loss import word_loss
from student_train.methods.losses import group_log_softmax, unit_count, vectors


class TaskLoss(Method):
    """Supervised loss of a task head, without a teacher: the no-distillation baseline and the way teachers are fine-tuned.

    Cross entropy for classes and for labelled tokens, squared error for scores (a classification head with one label),
    cross entropy of the softmax over a group's rows for choices. Rows without a label do not count.

    Term ``hard``: sum over labelled rows (choices: groups; token classification: tokens).
    """

    paper = "none: supervised learning"
    stages: ClassVar[Stages] = {"task": ("hard",)}
    accepts = "any with a task head"
    needs_teacher = False

    def __init__(self, student: ModelShape, teacher: ModelShape | None) -> None:
        key = task_key(student)
        super().__init__({key}, reads_labels=True)
        self.key, self.shape = key, student

    def counts(self, batch: Batch) -> Terms:
        return {"hard": label_count(batch, self.shape)}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        return {"hard": label_loss(vectors(student, self.key, batch), batch, self.shape)}


def task_key(shape: ModelShape) -> FeatureKey:
    """The task logits of a model: one vector for each labelled token or for each row.

    Raises:
        ValueError: the model has no task head.
    """
    check_site("task_logits", shape, None)
    return FeatureKey("task_logits", positions="labels" if shape.head == "token_classification" else "row")


def answer_count(batch: Batch, shape: ModelShape) -> Tensor:
    """0-d float32: how many answers a task head gives, labelled or not: of rows, of the labelled tokens, or of groups of choices."""
    if shape.head == "multiple_choice":
        return (batch.groups[1:] != batch.groups[:-1]).sum().float() + 1
    return unit_count(batch, task_key(shape).positions)


def label_count(batch: Batch, shape: ModelShape) -> Tensor:
    """0-d float32: labelled tokens, rows, or groups (by their right row) of ``batch``."""
    if shape.head == "token_classification":
        return batch.labelled.sum().float()
    labels_B = row_labels(batch, shape)
    if shape.head == "multiple_choice":
        return (labels_B == 1).sum().float()
    return (~labels_B.isnan() if shape.labels == 1 else labels_B != IGNORED).sum().float()


def label_loss(logits: Tensor, batch: Batch, shape: ModelShape) -> Tensor:
    """0-d sum of the supervised loss of ``logits`` [B, C] (token classification: [N, C])."""
    if shape.head == "token_classification":
        return word_loss(as_words(logits), batch)
    labels_B = row_labels(batch, shape)
    if shape.head == "multiple_choice":
        return -group_log_softmax(logits.squeeze(-1), batch.groups)[labels_B == 1].sum()
    if shape.labels == 1:
        known_B = ~labels_B.isnan()
        return (logits.squeeze(-1)[known_B] - labels_B[known_B]).square().sum()
    return F.cross_entropy(logits, labels_B, ignore_index=IGNORED, reduction="sum")


def row_labels(batch: Batch, shape: ModelShape) -> Tensor:
    """[B] labels, float32 for scores and else int64; NaN or IGNORED in rows without one."""
    score = shape.head == "classification" and shape.labels == 1
    if batch.row_labels is None:
        return torch.full_like(batch.rows, torch.nan, dtype=torch.float32) if score else torch.full_like(batch.rows, IGNORED)
    return batch.row_labels.float() if score else batch.row_labels.nan_to_num(IGNORED).long()
