"""Several models on one task, one after the other: what ``student-train evaluate`` does."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from online.fingerprints import tokenizer_fingerprint
from online.models import LoadedModel, ModelSpec, load_config, load_model, load_tokenizer, model_shape
from online.rows_spec import RowsSpec, corpus_fingerprint
from store.provenance import provenance
from student_train.held_out_texts import Texts, check_model, check_teacher, read_texts, scores
from student_train.outline import folder_head
from student_train.output import found_student
from student_train.results import Measured, Results
from student_train.speed import deployment
from student_train.tasks import TaskRows, rows_spec, task_named


@dataclass(frozen=True)
class Asked:
    """What is to be measured, and how."""

    task: str
    files: tuple[str, ...]
    teacher: Path | None = None
    limit: int | None = None
    changes: tuple[str, ...] = ()
    """To the options of rows, as ``key.path=value``."""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int | None = None
    batch_rows: int = 8
    """Of the batch that is timed."""
    repeats: int = 10


def measure(models: Sequence[Path], asked: Asked) -> Results:
    """Measure the teacher, if there is one, and then each of ``models``; all that can be checked is checked before the first is loaded.

    Raises:
        ValueError: an unknown task, bad data, a folder that holds no model or one that does not answer the task.
    """
    task = task_named(asked.task)
    spec = rows_spec(task, asked.files, asked.changes)
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    specs = [_spec(folder, task, spec, asked) for folder in ([asked.teacher] if asked.teacher else []) + list(models)]
    texts_of: dict[str, Texts] = {}
    for model in specs:
        tokenizer = load_tokenizer(model)
        if (fingerprint := tokenizer_fingerprint(tokenizer)) not in texts_of:
            texts_of[fingerprint] = read_texts(spec, tokenizer, asked.limit)
    teacher: LoadedModel | None = None
    measured = []
    for number, model in enumerate(specs):
        loaded = load_model(model, device=torch.device(asked.device))
        assert loaded.tokenizer is not None
        texts = texts_of[tokenizer_fingerprint(loaded.tokenizer)]
        if teacher is not None:
            check_teacher(loaded, teacher, texts)
        measured.append(_measured(loaded, model.model, teacher, task, texts, asked))
        if number == 0 and asked.teacher is not None:
            teacher = loaded
    return Results(
        task=asked.task,
        files=asked.files,
        corpus=corpus_fingerprint(spec),
        limit=asked.limit,
        rows=spec.model_dump(mode="json", exclude={"sources"}, exclude_defaults=True),
        official=task.official,
        benchmarks=task.benchmarks,
        teacher=None if asked.teacher is None else str(asked.teacher),
        models=tuple(measured),
        made=provenance(("student-train", *sys.argv[1:])),
    )


def _spec(folder: Path, task: TaskRows, rows: RowsSpec, asked: Asked) -> ModelSpec:
    """How a model is loaded that was named by ``folder``, once its configuration says that it answers the task."""
    found = found_student(folder)
    head = folder_head(found)
    check_model(str(folder), task, rows, model_shape(load_config(found), head))
    return ModelSpec(model=found, head=head, dtype=asked.dtype)


def _measured(loaded: LoadedModel, folder: Path, teacher: LoadedModel | None, task: TaskRows, texts: Texts, asked: Asked) -> Measured:
    found = scores(loaded, teacher, task, texts)
    return Measured(
        folder=str(folder),
        fingerprint=loaded.fingerprint,
        rows=texts.rows,
        scores=found,
        score=sum(found[name] for name in task.official) / len(task.official),
        deployment=deployment(loaded, folder, texts, asked.batch_rows, asked.repeats),
    )
