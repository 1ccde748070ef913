"""What a task head decides between, one line of scores a decision: the classes of a row or token, the choices of a group.

Shapes: B rows, U decisions (rows, labelled tokens, or groups of choices), C classes or choices of the largest group.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from online.batch import IGNORED, Batch
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods.base import TeacherShapes, check_equal
from student_train.methods.losses import MASKED, kl, mse
from student_train.methods.task_loss import row_labels, task_key


def shared_task(student: ModelShape, teachers: TeacherShapes) -> FeatureKey:
    """The task logits that the student and every one of its ``teachers`` answer with.

    Raises:
        ValueError: the student has no task head, or a teacher has another one or another number of labels.
    """
    key = task_key(student)
    for name, teacher in teachers.items():
        check_equal(f"heads (teacher {name})" if name else "heads", student.head, teacher.head)
        check_equal(f"numbers of labels (teacher {name})" if name else "numbers of labels", student.labels, teacher.labels)
    return key


def check_decides(shape: ModelShape, instead: str) -> None:
    """Refuse a head that gives a score, between which and others nothing is decided; ``instead`` says what takes scores."""
    if shape.head == "classification" and shape.labels == 1:
        raise ValueError(f"a head with one label gives scores, without probabilities; expected classes or choices, or {instead}")


def decisions(logits: Tensor, batch: Batch, shape: ModelShape) -> Tensor:
    """[U, C] scores of task logits [B or labelled tokens, labels]; where a group has fewer choices, MASKED."""
    if shape.head != "multiple_choice":
        return logits
    group_B, place_B, sizes_U = _places(batch)
    table_UC = logits.new_full((len(sizes_U), int(sizes_U.max())), MASKED)
    return table_UC.index_put((group_B, place_B), logits.squeeze(-1))


def decision_labels(batch: Batch, shape: ModelShape) -> Tensor:
    """[U] int64 number of the right class or choice, IGNORED where it is not known."""
    if shape.head == "token_classification":
        assert batch.token_labels is not None
        return batch.token_labels[batch.labelled]
    labels_B = row_labels(batch, shape)
    if shape.head != "multiple_choice":
        return labels_B
    group_B, place_B, sizes_U = _places(batch)
    right_B = labels_B == 1
    labels_U = torch.full_like(sizes_U, IGNORED)
    return labels_U.index_put((group_B[right_B],), place_B[right_B])


def soft_losses(student: Tensor, teacher: Tensor, batch: Batch, shape: ModelShape, temperature: float) -> Tensor:
    """[U] T^2 KL(softmax(teacher / T) || softmax(student / T)) of each decision; of scores (one label) the squared difference."""
    if shape.head == "classification" and shape.labels == 1:
        return mse(student, teacher)
    return kl(decisions(student, batch, shape), decisions(teacher, batch, shape), temperature)


def hard_losses(logits: Tensor, batch: Batch, shape: ModelShape) -> Tensor:
    """[U] supervised loss of each decision, 0 without a label: cross entropy; of scores (one label) the squared error."""
    if shape.head == "classification" and shape.labels == 1:
        labels_B = row_labels(batch, shape)
        return (logits.squeeze(-1) - labels_B.nan_to_num()).square().masked_fill(labels_B.isnan(), 0)
    return F.cross_entropy(decisions(logits, batch, shape), decision_labels(batch, shape), ignore_index=IGNORED, reduction="none")


def score_losses(student_UC: Tensor, teacher_UC: Tensor) -> Tensor:
    """[U] squared difference of the scores of each decision, mean over its classes or choices."""
    real_UC = student_UC > MASKED
    return (student_UC - teacher_UC).square().sum(-1) / real_UC.sum(-1)


def _places(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """[B] number of each row's group in the batch, [B] its place in there, [U] sizes of the groups; all int64."""
    _, group_B, sizes_U = batch.groups.unique_consecutive(return_inverse=True, return_counts=True)
    starts_U = sizes_U.cumsum(0) - sizes_U
    return group_B, torch.arange(len(group_B), device=group_B.device) - starts_U[group_B], sizes_U
