"""The recipe of a training run: phases, each with data, a teacher or none, a student start, and weighted methods."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from online.models import ModelSpec
from store.strict import Strict


class DataSpec(Strict):
    """Rows of one store."""

    store: Path
    split: str = "train"
    weight: float = Field(default=1.0, gt=0)
    """How often its rows come by in an epoch."""
    pass_name: str | None = None
    """Teacher pass to learn from; None where the store has no pass, or the phase no teacher."""


class StudentSpec(Strict):
    """Where the student's first weights come from; exactly one of ``model``, ``layers``, ``phase``, ``random``."""

    model: ModelSpec | None = None
    """A Hugging Face folder, as it is."""
    layers: tuple[int, ...] | None = None
    """Teacher blocks counted from 1, with embeddings and head, in this order."""
    source: Path | None = None
    """Folder whose blocks ``layers`` or whose configuration ``random`` takes; by default what the store's pass ships."""
    phase: str | None = None
    """Output of an earlier phase of this recipe."""
    random: dict[str, int | float | str | bool] | None = None
    """Random weights; changes to the source's configuration, such as {num_hidden_layers: 3}."""
    head: str | None = None
    """Head of the student (store.shape.Head); the teacher's by default."""
    dtype: Literal["float32", "bfloat16"] = "float32"


class MethodSpec(Strict):
    """One method with its weight; ``options`` are checked against the method's own arguments."""

    name: str
    weight: float = 1.0
    options: dict[str, object] = Field(default_factory=dict)


class PhaseSpec(Strict):
    """One stretch of training in one process, ending in a plain Hugging Face folder."""

    name: str = Field(pattern=r"[A-Za-z0-9][A-Za-z0-9_-]*")
    student: StudentSpec
    data: tuple[DataSpec, ...] = Field(min_length=1)
    teacher: Literal["store", "none"] = "store"
    methods: tuple[MethodSpec, ...] = Field(min_length=1)
    evaluate: tuple[DataSpec, ...] = ()
    metrics: tuple[str, ...] = ()
    """Names of student_train.metrics.METRICS, measured on each of ``evaluate``."""
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; or give ``epochs``."""
    epochs: float | None = Field(default=None, gt=0)
    batch_rows: int = Field(default=32, ge=1)
    """Rows of one optimiser step over all ranks and accumulation steps."""
    accumulation: int = Field(default=1, ge=1)
    workers: int = Field(default=0, ge=0)
    """Loader processes of each rank."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many evaluations without a better ``best`` metric."""
    best: str | None = None
    """Metric that picks the exported weights; a leading minus means lower is better. None exports the last."""
    trainer: dict[str, object] = Field(default_factory=dict)
    """Further arguments of transformers.TrainingArguments, such as learning_rate."""


class TrainRecipe(Strict):
    """A whole run."""

    output: Path
    seed: int = 0
    phases: tuple[PhaseSpec, ...] = Field(min_length=1)
