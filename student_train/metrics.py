"""What is measured on held-out rows: one literal table of metrics, and the columns that they are computed from.

A column is gathered batch by batch into one array over all rows (or labelled tokens) of the split; a metric turns
columns into a number. A metric declares what it needs, so that one the data cannot give is refused before training.
Shapes: R rows (labelled tokens for token classification), C outputs of the task head, N labelled tokens, W width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from online.batch import IGNORED, Batch, Features, dense
from online.words import Words, as_words, each
from store.features import FeatureKey
from store.manifest import RowsInfo
from store.shape import ModelShape
from store.strict import did_you_mean
from student_train import scores
from student_train.methods.base import check_vocabularies
from student_train.methods.cloze_loss import CLOZE, cloze_logits
from student_train.methods.divergences import shared
from student_train.methods.task_loss import task_key
from student_train.scores import Array

Columns = dict[str, Array]

LM_LOGITS = FeatureKey("lm_logits", positions="labels")
SENTENCE = FeatureKey("final", positions="mean")
TASK_HEADS = ("classification", "token_classification", "multiple_choice")
LM_HEADS = ("masked_lm", "causal_lm")


@dataclass(frozen=True)
class Column:
    """One array over a split and the features of both sides that it is made from."""

    gather: Callable[[Features, Features, Batch, ModelShape], Tensor]
    student: Callable[[ModelShape], frozenset[FeatureKey]]
    teacher: Callable[[ModelShape], frozenset[FeatureKey]]


@dataclass(frozen=True)
class Metric:
    """One number over a split."""

    about: str
    columns: tuple[str, ...]
    compute: Callable[..., float]
    tasks: tuple[str, ...] = ()
    """Kinds of labels that it can read (store.manifest.Task); empty: it reads no task labels."""
    outputs: tuple[int, int | None] = (1, None)
    """Fewest and most outputs of the task head."""
    heads: tuple[str, ...] = TASK_HEADS
    """Heads of the student, and of the teacher where its answers are read, that give the columns; empty: any. Of clozes a masked language
    model gives those of a task head."""


def _nothing(shape: ModelShape) -> frozenset[FeatureKey]:
    return frozenset()


def _task(shape: ModelShape) -> frozenset[FeatureKey]:
    return frozenset({CLOZE if shape.head == "masked_lm" else task_key(shape)})


def _answers(features: Features, batch: Batch, shape: ModelShape) -> Tensor:
    """[R, C] task logits, of a cloze those of its classes' words."""
    return cloze_logits(features, batch) if shape.head == "masked_lm" else dense(features, task_key(shape))


def _words(shape: ModelShape) -> frozenset[FeatureKey]:
    return frozenset({LM_LOGITS})


def _sentence(shape: ModelShape) -> frozenset[FeatureKey]:
    return frozenset({SENTENCE})


def _labels(student: Features, teacher: Features, batch: Batch, shape: ModelShape) -> Tensor:
    if shape.head == "token_classification":
        assert batch.token_labels is not None
        return batch.token_labels[batch.labelled]
    labels = batch.row_labels
    if labels is None:
        return torch.full(batch.rows.shape, torch.nan)
    return labels if labels.is_floating_point() else torch.where(labels == IGNORED, torch.nan, labels.double())


def _nll(student: Features, teacher: Features, batch: Batch, shape: ModelShape) -> Tensor:
    assert batch.token_labels is not None
    return each(partial(functional.cross_entropy, reduction="none"), _lm(student), batch.token_labels[batch.labelled])


def _word_kl(student: Features, teacher: Features, batch: Batch, shape: ModelShape) -> Tensor:
    return each(lambda one_MV, other_MV: scores.kl(*reversed(shared(one_MV, other_MV))), _lm(student), _lm(teacher))


def _lm(features: Features) -> Words:
    value = features[LM_LOGITS]
    return value if isinstance(value, Words) else as_words(dense(features, LM_LOGITS))


def _confidence(student: Features, teacher: Features, batch: Batch, shape: ModelShape) -> Tensor:
    return each(lambda logits_MV: logits_MV.softmax(-1).amax(-1), _lm(student))


def _right_word(student: Features, teacher: Features, batch: Batch, shape: ModelShape) -> Tensor:
    assert batch.token_labels is not None
    return each(lambda logits_MV, labels_M: logits_MV.argmax(-1) == labels_M, _lm(student), batch.token_labels[batch.labelled])


def _same_word(student: Features, teacher: Features, batch: Batch, shape: ModelShape) -> Tensor:
    return each(lambda one_MV, other_MV: one_MV.argmax(-1) == other_MV.argmax(-1), _lm(student), _lm(teacher))


def _accepted(student: Features, teacher: Features, batch: Batch, shape: ModelShape) -> Tensor:
    def share(one_MV: Tensor, other_MV: Tensor) -> Tensor:
        return torch.minimum(*(logits_MV.softmax(-1) for logits_MV in shared(one_MV, other_MV))).sum(-1)

    return each(share, _lm(student), _lm(teacher))


COLUMNS: dict[str, Column] = {
    "logits": Column(lambda student, teacher, batch, shape: _answers(student, batch, shape), _task, _nothing),
    "teacher_logits": Column(lambda student, teacher, batch, shape: _answers(teacher, batch, shape), _nothing, _task),
    "labels": Column(_labels, _nothing, _nothing),
    "groups": Column(lambda student, teacher, batch, shape: batch.groups, _nothing, _nothing),
    "nll": Column(_nll, _words, _nothing),
    "word_kl": Column(_word_kl, _words, _words),
    "confidence": Column(_confidence, _words, _nothing),
    "right_word": Column(_right_word, _words, _nothing),
    "same_word": Column(_same_word, _words, _words),
    "accepted": Column(_accepted, _words, _words),
    "sentence": Column(lambda student, teacher, batch, shape: dense(student, SENTENCE), _sentence, _nothing),
    "teacher_sentence": Column(lambda student, teacher, batch, shape: dense(teacher, SENTENCE), _nothing, _sentence),
}


_CLASSES = ("classification", "token")
_TASK = ("logits", "labels")

METRICS: dict[str, Metric] = {
    "accuracy": Metric("share of rows (tokens) whose likeliest class is right", _TASK, scores.accuracy, _CLASSES, (2, None)),
    "f1": Metric("F1 of class 1 of two", _TASK, scores.f1, _CLASSES, (2, 2)),
    "macro_f1": Metric("mean of the classes' F1", _TASK, scores.macro_f1, _CLASSES, (2, None)),
    "matthews": Metric("Matthews correlation", _TASK, scores.matthews, _CLASSES, (2, None)),
    "pearson": Metric("Pearson correlation with the score", _TASK, scores.pearson, ("regression",), (1, 1)),
    "spearman": Metric("Spearman correlation with the score", _TASK, scores.spearman, ("regression",), (1, 1)),
    "mse": Metric("mean squared error of the score", _TASK, scores.mse, ("regression",), (1, 1)),
    "choice_accuracy": Metric(
        "share of groups whose likeliest row is right", (*_TASK, "groups"), scores.choice_accuracy, ("choice",), (1, 2)
    ),
    "f1a": Metric("F1 of the right answers over all groups (MultiRC)", _TASK, scores.f1, ("classification",), (2, 2)),
    "exact_match": Metric("share of groups with every row right", (*_TASK, "groups"), scores.exact_match, ("classification",), (2, None)),
    "task_ece": Metric("calibration error of the likeliest class of rows (tokens), 15 bins", _TASK, scores.task_ece, _CLASSES, (2, None)),
    "perplexity": Metric("exp of the mean loss of the labelled tokens", ("nll",), scores.perplexity, heads=LM_HEADS),
    "agreement": Metric(
        "share of rows (tokens) with the teacher's likeliest class", ("logits", "teacher_logits"), scores.agreement, (), (2, None)
    ),
    "task_kl": Metric("mean KL(teacher || student) of the task logits", ("logits", "teacher_logits"), scores.task_kl, (), (2, None)),
    "teacher_kl": Metric(
        "mean KL(teacher || student) of the words at labelled tokens", ("word_kl",), lambda kl_N: float(kl_N.mean()), heads=LM_HEADS
    ),
    "word_agreement": Metric(
        "share of labelled tokens with the teacher's likeliest word", ("same_word",), lambda same_N: float(same_N.mean()), heads=LM_HEADS
    ),
    "acceptance": Metric(
        "chance that a word drawn from the student stands when the teacher checks it (speculative decoding): sum of min(p, q)",
        ("accepted",),
        lambda accepted_N: float(accepted_N.mean()),
        heads=LM_HEADS,
    ),
    "ece": Metric(
        "calibration error of the likeliest word at labelled tokens, 15 bins", ("confidence", "right_word"), scores.ece, heads=LM_HEADS
    ),
    "similarity_spearman": Metric(
        "Spearman correlation with the teacher of the cosine similarities of rows (mean of the final vectors)",
        ("sentence", "teacher_sentence"),
        scores.similarity_spearman,
        heads=(),
    ),
}


def student_keys(names: Sequence[str], shape: ModelShape) -> frozenset[FeatureKey]:
    """What the metrics ``names`` read of the student."""
    return frozenset(key for name in names for column in METRICS[name].columns for key in COLUMNS[column].student(shape))


def teacher_keys(names: Sequence[str], shape: ModelShape) -> frozenset[FeatureKey]:
    """What the metrics ``names`` read of the teacher; empty for those that need none."""
    return frozenset(key for name in names for column in METRICS[name].columns for key in COLUMNS[column].teacher(shape))


def check_metric(name: str, rows: RowsInfo, student: ModelShape, teacher: ModelShape | None) -> None:
    """Refuse a metric that these rows and models cannot give.

    Raises:
        ValueError: unknown name, or labels, outputs, heads or a teacher that do not fit; the message says which.
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}{did_you_mean(name, sorted(METRICS))}")
    metric, task = METRICS[name], rows.task.kind
    if metric.tasks and task not in metric.tasks:
        raise ValueError(f"metric {name!r} needs labels of kind {' or '.join(metric.tasks)}; the store's rows have kind {task}")
    if metric.heads == LM_HEADS and rows.objective == "plain":
        raise ValueError(f"metric {name!r} needs rows with labelled tokens (objective mlm or causal); the store's rows are plain")
    sides = {"student": student}
    if any(COLUMNS[column].teacher(student) for column in metric.columns):
        if teacher is None:
            raise ValueError(f"metric {name!r} compares with the teacher: give the evaluated data a pass_name of a teacher's pass")
        sides["teacher"] = teacher
    cloze = metric.heads == TASK_HEADS and bool(rows.verbalisers) and student.head == "masked_lm"
    heads = ("masked_lm",) if cloze else metric.heads
    for side, shape in sides.items():
        if heads and shape.head not in heads:
            raise ValueError(f"metric {name!r} needs a head of {', '.join(heads)}; the {side}'s is {shape.head}")
        fewest, most = metric.outputs
        outputs = len(rows.verbalisers) if cloze else shape.labels
        if metric.heads == TASK_HEADS and not fewest <= outputs <= (most or outputs):
            expected = f"{fewest}" if fewest == most else f"at least {fewest}" if most is None else f"{fewest} to {most}"
            raise ValueError(f"metric {name!r} needs {expected} outputs of the task head; the {side}'s has {outputs}")
    if teacher is not None and "teacher" in sides and metric.heads:
        if metric.heads != TASK_HEADS:
            check_vocabularies(student, teacher)
        elif student.labels != teacher.labels:
            raise ValueError(f"metric {name!r}: the student has {student.labels} outputs, the teacher {teacher.labels}")
