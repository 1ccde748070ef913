"""Tasks by name: how their official files become rows, and the metrics that their benchmark counts.

Text, labels and lengths are those of the recipes below recipes/tasks; RTE, which two benchmarks have, has the length of SuperGLUE's.
Metrics are those of GLUE (Wang et al. 2018, arXiv 1804.07461) and SuperGLUE (Wang et al. 2019, arXiv 1905.00537).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from online.rows_spec import RowsSpec
from store.shape import Head
from store.strict import did_you_mean, parse, set_by_path


@dataclass(frozen=True)
class TaskRows:
    """How a task is read and measured."""

    rows: dict[str, Any]
    """Options of online.rows.RowsSpec, without its sources."""
    official: tuple[str, ...]
    """Metrics whose mean is the task's score: names of student_train.metrics.METRICS, or of student_train.record.SCORES."""
    further: tuple[str, ...] = ()
    """What else is measured."""
    heads: tuple[Head, ...] = ("classification",)
    """Heads that answer it."""
    benchmarks: tuple[str, ...] = ()
    text: str | None = None
    """Column of the texts that ReCoRD's metrics compare."""


def _classes(text: Sequence[str], label: str, classes: Sequence[str], max_length: int, group: str | None = None) -> dict[str, Any]:
    rows: dict[str, Any] = {"text": list(text), "label": {"column": label, "classes": list(classes)}, "max_length": max_length}
    return rows if group is None else {**rows, "group": group}


_PAIR = ("{sentence1}", "{sentence2}")
_ECE = ("task_ece",)
_MNLI = _classes(_PAIR, "gold_label", ("entailment", "neutral", "contradiction"), 128)
_WORDS = {"text": ["{text}"], "long": "split", "empty": "skip"}

TASKS: dict[str, TaskRows] = {
    "boolq": TaskRows(_classes(_PAIR, "label", ("false", "true"), 256), ("accuracy",), _ECE, benchmarks=("superglue",)),
    "cb": TaskRows(
        _classes(_PAIR, "label", ("entailment", "contradiction", "neutral"), 256),
        ("macro_f1", "accuracy"),
        _ECE,
        benchmarks=("superglue",),
    ),
    "copa": TaskRows(
        {
            "text": ["{sentence1}", "What was the {question}?"],
            "choices": ["{choice1}", "{choice2}"],
            "label": {"column": "label", "classes": ["choice1", "choice2"]},
            "max_length": 256,
        },
        ("choice_accuracy",),
        heads=("multiple_choice",),
        benchmarks=("superglue",),
    ),
    "multirc": TaskRows(
        _classes(("{paragraph}", "{question}", "{answer}"), "label", ("wrong", "right"), 512, "question"),
        ("f1a", "exact_match"),
        _ECE,
        benchmarks=("superglue",),
    ),
    "record": TaskRows(
        _classes(("{passage}", "{statement}"), "label", ("wrong", "right"), 512, "question"),
        ("record_f1", "record_em"),
        ("f1a", "exact_match", *_ECE),
        benchmarks=("superglue",),
        text="entity",
    ),
    "rte": TaskRows(_classes(_PAIR, "label", ("entailment", "not_entailment"), 256), ("accuracy",), _ECE, benchmarks=("superglue", "glue")),
    "wic": TaskRows(
        _classes((*_PAIR, "{word}"), "label", ("different_sense", "same_sense"), 256), ("accuracy",), _ECE, benchmarks=("superglue",)
    ),
    "wsc": TaskRows(
        _classes(("{sentence1}", "{span2_text}", "{span1_text}"), "label", ("not_coreferent", "coreferent"), 128),
        ("accuracy",),
        _ECE,
        benchmarks=("superglue",),
    ),
    "cola": TaskRows(
        _classes(("{sentence}",), "label", ("unacceptable", "acceptable"), 128), ("matthews",), ("accuracy", *_ECE), benchmarks=("glue",)
    ),
    "mnli": TaskRows(_MNLI, ("accuracy",), _ECE, benchmarks=("glue",)),
    "mrpc": TaskRows(_classes(_PAIR, "label", ("not_equivalent", "equivalent"), 128), ("f1", "accuracy"), _ECE, benchmarks=("glue",)),
    "qnli": TaskRows(
        _classes(("{question}", "{sentence}"), "label", ("entailment", "not_entailment"), 128), ("accuracy",), _ECE, benchmarks=("glue",)
    ),
    "qqp": TaskRows(
        {**_classes(("{question1}", "{question2}"), "is_duplicate", ("not_duplicate", "duplicate"), 128), "empty": "skip"},
        ("f1", "accuracy"),
        _ECE,
        benchmarks=("glue",),
    ),
    "sst2": TaskRows(_classes(("{sentence1}",), "label", ("negative", "positive"), 128), ("accuracy",), _ECE, benchmarks=("glue",)),
    "stsb": TaskRows(
        {"text": list(_PAIR), "label": {"column": "label", "score": True}, "max_length": 128},
        ("pearson", "spearman"),
        ("mse",),
        benchmarks=("glue",),
    ),
    "mlm": TaskRows({**_WORDS, "objective": "mlm"}, ("perplexity",), ("ece",), heads=("masked_lm",)),
    "causal": TaskRows({**_WORDS, "objective": "causal"}, ("perplexity",), ("ece",), heads=("causal_lm",)),
}
"""Name -> task. MNLI's mismatched rows are another file of the task ``mnli``; of ``mlm`` and ``causal`` text is the column ``text``."""


def task_named(name: str) -> TaskRows:
    """The task ``name``; ``ValueError`` with the nearest known name if there is none."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{did_you_mean(name, list(TASKS))}")
    return TASKS[name]


def rows_spec(task: TaskRows, files: Sequence[str], changes: Sequence[str] = ()) -> RowsSpec:
    """How ``files`` become rows of ``task``, after each change ``key.path=value`` (value in YAML).

    Raises:
        ValueError: a change that no option of rows has, or that cannot be read.
    """
    copied: dict[str, Any] = {name: dict(value) if isinstance(value, dict) else value for name, value in task.rows.items()}
    copied["sources"] = [{"files": list(files), "split": "dev"}]
    for change in changes:
        set_by_path(copied, change)
    return parse(RowsSpec, copied, "rows")
