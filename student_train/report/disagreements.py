"""The held-out rows that teacher and students disagree on most, with their texts.

Shapes: R rows, C outputs of the task head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from tokenizers import Tokenizer

from store.errors import StoreError
from store.reader import Store
from student_train.report.answers import Answers, Array, divergence, read_answers
from student_train.report.combinations import Combination, best_of_methods
from student_train.report.runs import Runs
from student_train.report.section import Section, Table

ROWS = 15
METHODS = 4
"""Methods that have a column, the best ones."""
_LONGEST = 300
"""Letters of a text that are shown."""


@dataclass(frozen=True)
class _Side:
    """The students of a method's best combination: one for each seed, on the same rows."""

    method: str
    seeds: tuple[Answers, ...]

    @property
    def mean(self) -> Array:
        """[R, C] mean over seeds of their probabilities; of one output, of the scores."""
        return np.mean([_said(one.student) for one in self.seeds], axis=0)


def disagreements(runs: Runs) -> Section | None:
    """How often they disagree, and on what most; None where no teacher's answers were kept."""
    sides = [side for one in best_of_methods(runs)[:METHODS] if (side := _side(one)) is not None]
    if not sides:
        return None
    first = sides[0].seeds[0]
    sides = [side for side in sides if (side.seeds[0].split, side.seeds[0].rows.tolist()) == (first.split, first.rows.tolist())]
    assert first.teacher is not None
    apart = np.mean([_apart(one) for side in sides for one in side.seeds], axis=0)
    places = np.argsort(-apart, kind="stable")[:ROWS]
    texts, classes = _texts(first.store, first.rows[places])
    lacking = () if any(texts) else ("The store isn't here any more, so the rows are without their texts.",)
    if not runs.texts:
        texts, lacking = [""] * len(texts), ("The rows' texts were left out when the report was made.",)
    teacher = _said(first.teacher)
    lines = []
    for place, text in zip(places.tolist(), texts, strict=True):
        label = first.labels[place]
        known = "" if np.isnan(label) else _label(label, classes)
        said = [_answer(teacher[place], classes), *(_answer(side.mean[place], classes) for side in sides)]
        lines.append((str(first.rows[place]), *([text] if any(texts) else []), known, *said, f"{apart[place]:.2f}"))
    measure = "distance" if teacher.shape[1] == 1 else "KL"
    header = ("row", *(["text"] if any(texts) else []), "label", "teacher", *(side.method for side in sides), measure)
    about = "mean over seeds; KL(teacher || student) in nats" if measure == "KL" else "mean over seeds"
    table = Table(
        f"The {len(lines)} rows furthest apart", header, tuple(lines), f"Probability of the likeliest class ({about}), mean over methods."
    )
    found = [] if measure != "KL" else [_rates(sides)]
    text = f"Split {first.split} of {first.store}, {len(first.rows):,} rows; the best combination of each method."
    return Section("Where students and teacher disagree", (text, *lacking), (*found, table))


def _side(one: Combination) -> _Side | None:
    """The first held-out split with a teacher's answers."""
    found: list[Answers] = []
    for run in one.finished:
        answers = [] if run.phase is None else [split for split in read_answers(run.phase) if split.teacher is not None]
        if answers and (not found or answers[0].rows.tolist() == found[0].rows.tolist()):
            found.append(answers[0])
    return _Side(one.method, tuple(found)) if found else None


def _rates(sides: Sequence[_Side]) -> Table:
    """How often each method's students answer otherwise than the teacher, and who is right then."""
    lines = []
    for side in sides:
        counts = []
        for one in side.seeds:
            assert one.teacher is not None
            student_R, teacher_R = one.student.argmax(1), one.teacher.argmax(1)
            other_R = student_R != teacher_R
            right = float((other_R & (student_R == one.labels)).sum()), float((other_R & (teacher_R == one.labels)).sum())
            counts.append((float(other_R.sum()), *right))
        other, student, teacher = np.mean(counts, axis=0)
        rows = len(side.seeds[0].rows)
        lines.append((side.method, f"{other:.1f}", f"{100 * other / rows:.1f} %", f"{student:.1f}", f"{teacher:.1f}"))
    header = ("method", "rows answered otherwise", "share", "student is right", "teacher is right")
    return Table("How often", header, tuple(lines), "Mean numbers of rows over seeds; who is right, by the label.")


def _apart(one: Answers) -> Array:
    """[R] KL(teacher || student) of classes, or the distance of scores."""
    assert one.teacher is not None
    found: Array = divergence(one.teacher, one.student) if one.student.shape[1] > 1 else np.abs(one.teacher - one.student)[:, 0]
    return found


def _said(logits_RC: Array) -> Array:
    found: Array = softmax(logits_RC, axis=1) if logits_RC.shape[1] > 1 else logits_RC
    return found


def _answer(said: Array, classes: Sequence[str]) -> str:
    return f"{said[0]:.2f}" if len(said) == 1 else f"{_label(int(said.argmax()), classes)} {said.max():.2f}"


def _label(number: float, classes: Sequence[str]) -> str:
    return classes[int(number)] if number == int(number) and int(number) < len(classes) else f"{number:g}"


def _texts(path: Path, rows: NDArray[np.int64]) -> tuple[list[str], Sequence[str]]:
    """The texts of ``rows`` as the teacher's tokenizer decodes them, and the names of classes; empty ones where the store is gone."""
    try:
        store = Store.open(path)
    except (StoreError, OSError):
        return [""] * len(rows), ()
    classes = store.manifest.rows.task.classes
    folders = [store.shipped(name, configured=False) for name in store.manifest.passes]
    file = next((folder / "tokenizer.json" for folder in folders if (folder / "tokenizer.json").is_file()), None)
    tokenizer = None if file is None else Tokenizer.from_file(str(file))
    texts = []
    for row in rows:
        ids = store.tokens("input_ids", np.array([row])).tolist()
        text = f"ids {' '.join(map(str, ids))}" if tokenizer is None else tokenizer.decode(ids)
        texts.append(text if len(text) <= _LONGEST else f"{text[:_LONGEST].rstrip()} …")
    return texts, classes
