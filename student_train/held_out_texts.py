"""Measure a model on rows that are built in memory from text: no store, and the rows that one would have.

Shapes: B rows of a batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from online.batch import Batch, Features
from online.capture import Capture
from online.collate import collate_rows
from online.corpus import read_records
from online.fingerprints import tokenizer_fingerprint
from online.kept_words import kept_words
from online.models import LM_HEADS, LoadedModel, check_length, forward
from online.rows import iter_groups, pad_id
from online.rows_spec import RowsSpec
from store.rows import Row
from store.shape import ModelShape
from student_train.evaluate import BATCH_ROWS
from student_train.methods.base import check_vocabularies
from student_train.metrics import COLUMNS, METRICS, student_keys, teacher_keys
from student_train.record import SCORES, record_score
from student_train.tasks import TaskRows
from student_train.translation import translated

COMPARED = {True: ("word_agreement", "teacher_kl"), False: ("agreement", "task_kl")}
"""What is compared with a teacher: of words, of classes."""
_RECORD_COLUMNS = ("logits", "labels", "groups")


@dataclass(frozen=True)
class Texts:
    """Rows of a task in one tokenizer's ids."""

    spec: RowsSpec
    groups: list[list[Row]]
    """In the order of the file; rows of a group are measured together."""
    tokenizer: str
    """Its fingerprint."""
    pad: int

    @property
    def rows(self) -> int:
        return sum(map(len, self.groups))

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.input_ids) for group in self.groups for row in group)

    def batch(self, rows: Sequence[Row]) -> Batch:
        """``rows`` padded to the longest of them."""
        return collate_rows(rows, self.spec.objective, self.spec.task, self.pad)


def read_texts(spec: RowsSpec, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> Texts:
    """The rows of ``spec``, at most ``limit`` of them (a group is never cut: the last one may go over it).

    Raises:
        ValueError: as online.rows.iter_groups; no row at all.
    """
    groups: list[list[Row]] = []
    count = 0
    for group in iter_groups(spec, tokenizer):
        groups.append(group)
        count += len(group)
        if limit is not None and count >= limit:
            break
    if not groups:
        raise ValueError(f"no rows to measure on in {', '.join(file for source in spec.sources for file in source.files)}")
    return Texts(spec, groups, tokenizer_fingerprint(tokenizer), pad_id(tokenizer))


def names_of(task: TaskRows, student: LoadedModel, teacher: LoadedModel | None) -> tuple[str, ...]:
    """The metrics that are measured: the task's, and where there is a teacher how much they agree (of one output they do not compare)."""
    names = (*task.official, *task.further)
    words = student.shape.head in LM_HEADS
    return names if teacher is None or not (words or student.shape.labels > 1) else (*names, *COMPARED[words])


def check_model(folder: str, task: TaskRows, spec: RowsSpec, shape: ModelShape) -> None:
    """Refuse a model that does not answer the task.

    Raises:
        ValueError: another head, or another number of outputs than there are classes.
    """
    head, outputs = shape.head, shape.labels
    if head not in task.heads:
        raise ValueError(f"{folder}: the task needs a model with the head {' or '.join(task.heads)}, found {head}")
    expected = {"classification": len(spec.task.classes), "regression": 1}.get(spec.task.kind)
    if expected is not None and outputs != expected:
        what = "scores" if spec.task.kind == "regression" else f"the classes {', '.join(spec.task.classes)}"
        raise ValueError(f"{folder}: expected {expected} outputs of the task head, for {what}; found {outputs}")


def check_teacher(student: LoadedModel, teacher: LoadedModel, texts: Texts) -> None:
    """Refuse a teacher that does not read ``texts``, the student's rows, or whose answers are others'.

    Raises:
        ValueError: another tokenizer, another head, or a teacher that keeps only some words.
    """
    if teacher.tokenizer is None or tokenizer_fingerprint(teacher.tokenizer) != texts.tokenizer:
        raise ValueError("the teacher has another tokenizer than the student: measure them without --teacher, each on rows of its own")
    if student.shape.head != teacher.shape.head:
        raise ValueError(f"the student has the head {student.shape.head}, the teacher {teacher.shape.head}")
    if student.shape.head in LM_HEADS:
        if kept_words(teacher.model) is not None:
            raise ValueError("the teacher keeps only some words: it can be measured, but no student be compared with it")
        if kept_words(student.model) is None:  # otherwise the teacher's words are brought into the student's order
            check_vocabularies(student.shape, teacher.shape)


@torch.no_grad()
def scores(student: LoadedModel, teacher: LoadedModel | None, task: TaskRows, texts: Texts) -> dict[str, float]:
    """Metric -> value over ``texts``, in eval mode; rows of like length are measured together.

    Raises:
        ValueError: rows longer than a model takes, or what a metric refuses.
    """
    names = names_of(task, student, teacher)
    plain = [name for name in names if name in METRICS]
    needed = [column for name in plain for column in METRICS[name].columns] + (list(_RECORD_COLUMNS) if task.text else [])
    gathered: dict[str, list[Tensor]] = {column: [] for column in needed}
    wanted = student_keys(plain, student.shape)
    asked = frozenset() if teacher is None else teacher_keys(plain, teacher.shape)
    for model in (student, teacher):
        if model is not None:
            check_length(model, texts.longest)
            model.model.eval()
    device = next(student.model.parameters()).device
    ordered = sorted(texts.groups, key=lambda group: max(len(row.input_ids) for row in group))
    for rows in _batches(ordered):
        batch = texts.batch(rows).to(device)
        answers: Features = {}
        if teacher is not None and asked:
            with Capture(teacher, asked) as capture:
                forward(teacher, batch)
            answers = capture.features(batch)
        batch, answers = translated(student, batch, answers)
        with Capture(student, wanted) as capture:
            forward(student, batch)
        own = capture.features(batch)
        for column, parts in gathered.items():
            parts.append(COLUMNS[column].gather(own, answers, batch, student.shape).double().cpu())
    columns = {column: torch.cat(parts).numpy() for column, parts in gathered.items()}
    found = {name: METRICS[name].compute(*(columns[column] for column in METRICS[name].columns)) for name in plain}
    if task.text:
        texts_R = _texts(texts.spec, task.text, [row for group in ordered for row in group])
        logits_RC, labels_R, groups_R = (columns[column] for column in _RECORD_COLUMNS)
        found |= {name: record_score(name, logits_RC, labels_R, groups_R, texts_R) for name in SCORES}
    return {name: found[name] for name in names}


def _batches(groups: Sequence[list[Row]]) -> Iterator[list[Row]]:
    """About BATCH_ROWS rows at a time, cut between groups."""
    rows: list[Row] = []
    for group in groups:
        if rows and len(rows) + len(group) > BATCH_ROWS:
            yield rows
            rows = []
        rows = rows + group
    yield rows


def _texts(spec: RowsSpec, column: str, rows: Sequence[Row]) -> list[str]:
    """What the column ``column`` says of each row."""
    of_records = {(record.file, record.number): str(record.values[column]) for record in read_records(spec.sources, (column,))}
    return [of_records[row.source, row.record] for row in rows]
