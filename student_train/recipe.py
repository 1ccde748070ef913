"""The recipe of a training run: phases, each with data, a teacher or none, a student start, and weighted methods."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from online.models import ModelSpec
from store.filters import Where
from store.order import Shuffle
from store.shape import Head
from store.strict import Strict, did_you_mean
from store.together import PassName


class DataSpec(Strict):
    """Rows of one store."""

    store: Path
    split: str = "train"
    weight: float = Field(default=1.0, gt=0)
    """How often its rows come by in an epoch."""
    pass_name: PassName | None = None
    """Teacher pass to learn from, or a list of passes that one teacher answered, which are read as one; None where the store has no
    pass, or the phase no teacher."""
    where: Where | None = None
    """Take only the rows that meet these conditions."""
    follow: float | None = Field(default=None, gt=0)
    """The store is still being dumped: wait for shards that are not there yet, until none came for so many seconds."""
    shuffle: Shuffle = "random"
    """How training mixes the rows, anew each epoch: ``random`` all of them; ``block`` the slots of the store, and then the rows of
    ``window`` slots at a time, so that remote or spinning storage is read in long stretches."""
    window: int | None = Field(default=None, ge=1)
    """Slots that ``block`` mixes at a time; 16 by default."""
    by_length: int | None = Field(default=None, ge=1)
    """Put rows of like length into a step, which saves padding: the rows of so many steps are sorted by length, and the steps mixed again;
    50 to 100 do well. With a store of billions of rows, take shuffle: block, or each step looks up lengths all over it."""

    @field_validator("pass_name")
    @classmethod
    def _different(cls, value: PassName | None) -> PassName | None:
        if not isinstance(value, tuple):
            return value
        if not value or len(set(value)) < len(value):
            raise ValueError("expected a pass, or different passes of one teacher such as [bert, bert-2]")
        return value[0] if len(value) == 1 else value

    @model_validator(mode="after")
    def _consistent_rows(self) -> "DataSpec":
        if self.window is not None and self.shuffle != "block":
            raise ValueError("window goes with shuffle: block")
        if self.where is not None and self.pass_name is None and (self.where.entropy or self.where.confidence):
            raise ValueError("where: entropy and confidence are those of a teacher: give its pass_name")
        return self


class StudentSpec(Strict):
    """Where the student's first weights come from; exactly one of ``model``, ``layers``, ``phase``, ``random``."""

    model: ModelSpec | None = None
    """A Hugging Face folder, as it is."""
    layers: tuple[int, ...] | str | None = None
    """Teacher blocks counted from 1, in this order, with embeddings, norms and head; ``first 3`` is [1, 2, 3],
    ``every 2`` of six blocks is [2, 4, 6]."""
    source: Path | None = None
    """Folder whose blocks ``layers`` or whose configuration ``random`` takes; by default what the store's pass ships."""
    phase: str | None = None
    """Output of an earlier phase of this recipe."""
    random: dict[str, int | float | str | bool] | None = None
    """Random weights; changes to the source's configuration, such as {num_hidden_layers: 3}."""
    head: Head | None = None
    """Head of the student; the source's by default. A head that the source lacks starts from random weights."""
    labels: int | None = Field(default=None, ge=1)
    """Outputs of a task head; the source's by default, or the classes of the store's labels where the head is new."""
    dtype: Literal["float32", "bfloat16"] = "float32"

    @field_validator("layers")
    @classmethod
    def _known_choice(cls, value: tuple[int, ...] | str | None) -> tuple[int, ...] | str | None:
        if isinstance(value, str) and not re.fullmatch(r"(first|every) [1-9]\d*", value):
            raise ValueError("expected a list of blocks such as [1, 2, 3], 'first 3' or 'every 2'")
        if value == ():
            raise ValueError("expected at least one block")
        return value

    @model_validator(mode="after")
    def _one_start(self) -> "StudentSpec":
        starts = ("model", "layers", "phase", "random")
        given = [name for name in starts if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of {', '.join(starts)}; given: {', '.join(given) or 'none'}")
        if self.source is not None and given[0] not in ("layers", "random"):
            raise ValueError(f"source goes with layers or random, not with {given[0]}")
        if self.model is not None and (self.head, self.labels) != (None, None):
            raise ValueError("head and labels of a folder are given inside model")
        return self


class MethodSpec(Strict):
    """One method with its weight; ``options`` are checked against the method's own arguments."""

    name: str
    weight: float = 1.0
    options: dict[str, object] = Field(default_factory=dict)


class PhaseSpec(Strict):
    """One stretch of training in one process, ending in a plain Hugging Face folder."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    student: StudentSpec
    data: tuple[DataSpec, ...] = Field(min_length=1)
    teacher: Literal["store", "none"] = "store"
    methods: tuple[MethodSpec, ...] = Field(min_length=1)
    evaluate: tuple[DataSpec, ...] = ()
    metrics: tuple[str, ...] = ()
    """Names of student_train.metrics.METRICS, measured on each of ``evaluate``."""
    evaluate_rows: int | None = Field(default=None, ge=1)
    """Measure on at most this many rows of each, the first ones; by default on all."""
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

    @model_validator(mode="after")
    def _consistent(self) -> "PhaseSpec":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"phase {self.name!r}: expected one of steps and epochs; given: {'none' if self.steps is None else 'both'}")
        if any((data.shuffle, data.by_length) != ("random", None) for data in self.evaluate):
            raise ValueError(f"phase {self.name!r}: evaluate reads rows in their order: leave out shuffle, window and by_length there")
        if self.metrics and not self.evaluate:
            raise ValueError(f"phase {self.name!r}: metrics need data to measure on: give evaluate")
        if self.best is not None and not self.evaluate:
            raise ValueError(f"phase {self.name!r}: best needs evaluate")
        if self.patience is not None and self.best is None:
            raise ValueError(f"phase {self.name!r}: patience needs best, the metric to watch")
        if self.teacher == "store" and not any(data.pass_name for data in self.data):
            raise ValueError(f"phase {self.name!r} learns from a teacher: give its data a pass_name, or the phase 'teacher: none'")
        return self


class TrainRecipe(Strict):
    """A whole run."""

    output: Path
    seed: int = Field(default=0, ge=0, lt=2**32)
    phases: tuple[PhaseSpec, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _phases_in_order(self) -> "TrainRecipe":
        earlier: list[str] = []
        for phase in self.phases:
            if phase.name in earlier:
                raise ValueError(f"two phases are named {phase.name!r}: give each its own name")
            start = phase.student.phase
            if start is not None and start not in earlier:
                known = did_you_mean(start, earlier) if earlier else ": it is the first"
                raise ValueError(f"phase {phase.name!r} starts from {start!r}, which is no earlier phase{known}")
            earlier.append(phase.name)
        return self

    def phase(self, name: str) -> PhaseSpec:
        """The phase called ``name``."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise ValueError(f"the recipe has no phase {name!r}{did_you_mean(name, [phase.name for phase in self.phases])}")
