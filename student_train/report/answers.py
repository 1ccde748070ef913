"""What finished students answered to held-out rows, beside their labels and what their teachers answered.

Shapes: R rows, C outputs of the task head.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.special import log_softmax

from student_train.report.runs import Phase

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """Those of one split."""

    store: Path
    split: str
    rows: NDArray[np.int64]
    """[R] their numbers in the store."""
    labels: Array
    """[R] NaN for a row without one."""
    student: Array
    """[R, C] logits."""
    teacher: Array | None
    """[R, C] logits; None where no metric compared with it."""


def read_answers(phase: Phase) -> list[Answers]:
    """Those of a phase's predictions.parquet, a split at a time; nothing where it has none.

    Raises:
        ValueError: the file is damaged.
    """
    if phase.predictions is None:
        return []
    try:
        table = pq.read_table(phase.predictions)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{phase.predictions} is damaged: {error}; remove it, and the report does without it") from None
    if lacking := {"store", "split", "row", "label", "student", "teacher"} - set(table.column_names):
        raise ValueError(
            f"{phase.predictions} is damaged: it has no {', '.join(sorted(lacking))}; remove it, and the report does without it"
        )
    groups: dict[tuple[str, str], list[int]] = {}
    for place, of in enumerate(zip(table["store"].to_pylist(), table["split"].to_pylist(), strict=True)):
        groups.setdefault(of, []).append(place)
    return [_answers(Path(store), split, table.take(places)) for (store, split), places in groups.items()]


def row_values(answers: Answers, metric: str) -> Array | None:
    """[R] what the mean over rows of is ``metric``; None where it is no such mean, or a row lacks what it is made from."""
    student_RC, teacher_RC, label_R = answers.student, answers.teacher, answers.labels
    if metric == "accuracy" and not np.isnan(label_R).any():
        return (student_RC.argmax(1) == label_R).astype(float)
    if metric == "mse" and not np.isnan(label_R).any():
        return np.square(student_RC[:, 0] - label_R)
    if metric == "agreement" and teacher_RC is not None:
        return (student_RC.argmax(1) == teacher_RC.argmax(1)).astype(float)
    if metric == "task_kl" and teacher_RC is not None:
        return divergence(teacher_RC, student_RC)
    return None


def divergence(teacher_RC: Array, student_RC: Array) -> Array:
    """[R] KL(teacher || student) in nats."""
    teacher_log, student_log = log_softmax(teacher_RC, axis=1), log_softmax(student_RC, axis=1)
    found: Array = (np.exp(teacher_log) * (teacher_log - student_log)).sum(1)
    return found


def _answers(store: Path, split: str, table: pa.Table) -> Answers:
    teacher = table["teacher"]
    return Answers(
        store,
        split,
        table["row"].to_numpy(),
        table["label"].to_numpy(),
        np.array(table["student"].to_pylist(), dtype=np.float64),
        np.array(teacher.to_pylist(), dtype=np.float64) if teacher.null_count == 0 else None,
    )
