"""The recipe of a training run: phases, each with data, a teacher or none, a student start, and weighted methods."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from online.models import ModelSpec
from store.filters import Where
from store.order import Shuffle
from store.shape import Head
from store.strict import Strict, did_you_mean
from store.together import PassName
from student_train.adapters import LoraSpec
from student_train.live import LiveSpec, Online, teacher_kind
from student_train.methods.base import LayerMap
from student_train.schedule import Scheduled
from student_train.zero import Zero


def _different_passes(value: PassName | None) -> PassName | None:
    if not isinstance(value, tuple):
        return value
    if not value or len(set(value)) < len(value):
        raise ValueError("expected a pass, or different passes of one teacher such as [bert, bert-2]")
    return value[0] if len(value) == 1 else value


class DataSpec(Strict):
    """Rows of one store."""

    store: Path
    split: str = "train"
    weight: float = Field(default=1.0, gt=0)
    """How often its rows come by in an epoch."""
    pass_name: PassName | None = None
    """Teacher pass to learn from, or a list of passes that one teacher answered, which are read as one; None where the store has no
    pass, or the phase no teacher."""
    teachers: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")], PassName] = Field(default_factory=dict)
    """Instead of pass_name, for methods that learn from several teachers: name -> its pass, or passes, from small to large. Metrics compare
    with the last one."""
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

    def __hash__(self) -> int:
        return hash((self.store, self.split, self.pass_name, tuple(self.teachers.items())))

    @field_validator("pass_name")
    @classmethod
    def _different(cls, value: PassName | None) -> PassName | None:
        return _different_passes(value)

    @field_validator("teachers")
    @classmethod
    def _different_of_each(cls, value: dict[str, PassName]) -> dict[str, PassName]:
        return {name: passes for name, given in value.items() if (passes := _different_passes(given)) is not None}

    @property
    def answers(self) -> dict[str, PassName]:
        """Teacher -> its pass or passes; the only one has no name."""
        return {"": self.pass_name} if self.pass_name is not None else self.teachers

    @property
    def compared(self) -> str:
        """Name of the teacher that metrics and student starts go by: the only or the last one."""
        return next(reversed(self.answers), "")

    @property
    def compared_pass(self) -> PassName | None:
        """Its pass or passes; None where there is no teacher."""
        return self.answers.get(self.compared)

    @model_validator(mode="after")
    def _consistent_rows(self) -> "DataSpec":
        if self.pass_name is not None and self.teachers:
            raise ValueError("expected pass_name (one teacher) or teachers (several), found both")
        if self.window is not None and self.shuffle != "block":
            raise ValueError("window goes with shuffle: block")
        if self.where is not None and self.pass_name is None and (self.where.entropy or self.where.confidence):
            raise ValueError("where: entropy and confidence are those of a teacher: give its pass_name")
        return self


class ProbeSpec(Strict):
    """What a phase measures of the distance of student and teacher as it trains, without learning from it (docs/probes.md)."""

    data: DataSpec | None = None
    """Where the rows and the teacher's answers are; by default the first of the phase's ``evaluate`` and ``data`` with a teacher."""
    rows: int = Field(default=64, ge=1)
    """Measure on the first so many rows of the split."""
    every: int | None = Field(default=None, ge=1)
    """Measure every so many optimiser steps, beside those before the first, after the last and at every evaluation."""
    distances: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names of student_train.distances.DISTANCES; by default all that the two models allow."""
    layers: LayerMap = "uniform"
    """Which teacher block each student block is compared with."""
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(1.0, 5.0, 10.0, 15.0, 20.0), min_length=1)
    """Of the softmax in ``soft`` and ``words``."""


class ImportantLayers(Strict):
    """The teacher's blocks that change its hidden states most (block influence), in their order."""

    keep: int = Field(ge=1)
    """How many."""
    by: Literal["importance"]
    """1 - the mean cosine of a block's input and output, from the hidden states that the store's pass holds."""


class VocabularySpec(Strict):
    """The words that the student keeps (GLMD's vocabulary compression, arXiv 2306.06625; docs/vocabulary.md). Each dropped word is read as
    the kept one that stands for it. Later phases that start from this student go on with the same words."""

    rate: float = Field(default=0.5, gt=0, le=1)
    """Share of the words that stay, the most frequent ones of the phase's rows; their number is rounded up to a multiple of 128."""
    map: Literal["inner_product", "cosine", "euclidean", "unk"] = "inner_product"
    """Which kept word stands for a dropped one: that whose word embedding has the largest inner product or cosine with its own, or lies
    nearest to it; ``unk``: the unknown token for all."""
    keep: tuple[str, ...] = ()
    """Words of one token each that stay however rare they are, such as the verbalisers of later phases; each also in lower case where that
    is one token. Special tokens always stay."""
    source: Path | None = None
    """Folder of the model whose word embeddings are compared, the pretrained teacher's; by default what the student starts from."""


class StudentSpec(Strict):
    """Where the student's first weights come from; exactly one of ``model``, ``layers`` (with or without ``width``, which by itself takes
    all blocks), ``phase``, ``random``."""

    model: ModelSpec | None = None
    """A Hugging Face folder, as it is."""
    layers: tuple[int, ...] | str | ImportantLayers | None = None
    """Teacher blocks counted from 1, in this order, with embeddings, norms and head; ``first 3`` is [1, 2, 3],
    ``every 2`` of six blocks is [2, 4, 6], ``{keep: 3, by: importance}`` those that change hidden states most."""
    width: dict[str, Annotated[int, Field(ge=1)]] | None = Field(default=None, min_length=1)
    """Cut these blocks (by default all) narrower: changes to the source's configuration, such as {hidden_size: 192,
    num_attention_heads: 6, intermediate_size: 768}. Rows and columns of the weights are left out, heads as a whole; such a student
    starts far from its teacher."""
    width_by: Literal["first", "importance"] = "first"
    """Which channels, heads and feed-forward units stay: the first ones, or those of the largest activations in the store's pass
    (feed-forward units: of the largest weights)."""
    source: Path | None = None
    """Folder whose blocks ``layers`` and ``width`` or whose configuration ``random`` take; by default what the store's pass ships."""
    phase: str | None = None
    """Output of an earlier phase of this recipe."""
    random: dict[str, int | float | str | bool] | None = None
    """Random weights; changes to the source's configuration, such as {num_hidden_layers: 3}."""
    rest: Literal["random", "source"] = "random"
    """With ``random``: embeddings, head and all else outside of blocks; ``source`` takes it from there, where sizes and kinds of layers
    agree (MobileBERT's start)."""
    head: Head | None = None
    """Head of the student; the source's by default. A head that the source lacks starts from random weights."""
    labels: int | None = Field(default=None, ge=1)
    """Outputs of a task head; the source's by default, or the classes of the store's labels where the head is new."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoraSpec | None = None
    """Train low-rank adapters instead of all weights (peft). The exported student has them added to its weights."""
    vocabulary: VocabularySpec | None = None
    """Keep only some words, with any start; by default all, or those that what it starts from keeps."""

    @field_validator("layers")
    @classmethod
    def _known_choice(cls, value: tuple[int, ...] | str | ImportantLayers | None) -> tuple[int, ...] | str | ImportantLayers | None:
        if isinstance(value, str) and not re.fullmatch(r"(first|every) [1-9]\d*", value):
            raise ValueError("expected a list of blocks such as [1, 2, 3], 'first 3' or 'every 2'")
        if value == ():
            raise ValueError("expected at least one block")
        return value

    @model_validator(mode="after")
    def _one_start(self) -> "StudentSpec":
        starts = ("model", "layers", "phase", "random")
        given = [name for name in starts if getattr(self, name) is not None]
        if self.width is not None and self.layers is None:  # of all blocks
            given.append("width")
        if len(given) != 1:
            raise ValueError(f"expected exactly one of {', '.join(starts)}; given: {', '.join(given) or 'none'}")
        if self.source is not None and given[0] not in ("layers", "width", "random"):
            raise ValueError(f"source goes with layers, width or random, not with {given[0]}")
        if self.rest != "random" and self.random is None:
            raise ValueError("rest says what becomes of embeddings and head beside random blocks: give random")
        if self.width_by != "first" and self.width is None:
            raise ValueError("width_by says what of a width stays: give width")
        if self.model is not None and self.model.quantisation:
            raise ValueError("quantised weights do not train: leave quantisation out of the student's model")
        if self.model is not None and (self.head, self.labels) != (None, None):
            raise ValueError("head and labels of a folder are given inside model")
        return self


class MethodSpec(Strict):
    """One method with its weight; ``options`` are checked against the method's own arguments."""

    name: str
    weight: Scheduled = 1.0
    options: dict[str, object] = Field(default_factory=dict)
    teacher: str | None = None
    """Which of the data's ``teachers`` it learns from, where there are several and it learns from one."""
    carry: str | None = None
    """Earlier phase whose method of this name hands on the parameters that it learned, projections for instance; fresh ones by default."""


class PhaseSpec(Strict):
    """One stretch of training in one process, ending in a plain Hugging Face folder."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    student: StudentSpec
    data: tuple[DataSpec, ...] = Field(min_length=1)
    teacher: Annotated[
        Annotated[Literal["store", "none"], Tag(teacher_kind(""))] | Annotated[Online, Tag(teacher_kind({}))], Discriminator(teacher_kind)
    ] = "store"
    """Where teachers answer: ``store`` reads what a pass holds; ``{online: MODEL}`` runs them in the job, on rows alone; ``none``."""
    methods: tuple[MethodSpec, ...] = Field(min_length=1)
    meta: DataSpec | None = None
    """Held-out rows, a batch of which methods that learn weights for the training rows look at in each step (rw_kd)."""
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
    zero: Zero | None = None
    """Share the student's optimiser state, gradients and weights out over the ranks of a launch (DeepSpeed); by default each has all."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many evaluations without a better ``best`` metric."""
    gradient_norms: int | None = Field(default=None, ge=1)
    """Log every so many steps the norm of the gradient in each block of the student, and in the whole of it for each loss term."""
    probe: ProbeSpec | None = None
    """Record how far the student is from its teacher, feature by feature, as it trains."""
    best: str | None = None
    """Metric that picks the exported weights; a leading minus means lower is better. None exports the last."""
    trainer: dict[str, object] = Field(default_factory=dict)
    """Further arguments of transformers.TrainingArguments, such as learning_rate."""

    @property
    def probed(self) -> DataSpec | None:
        """Where the probe's rows are; None without a probe."""
        if self.probe is None:
            return None
        return self.probe.data or next((data for data in (*self.evaluate, *self.data) if data.answers or self.live), self.data[0])

    @property
    def read(self) -> tuple[DataSpec, ...]:
        """All data that the phase reads; what the probe reads is last."""
        return (*self.data, *self.evaluate, *([self.meta] if self.meta else []), *([self.probed] if self.probed else []))

    @property
    def live(self) -> dict[str, LiveSpec]:
        """Teachers that run in the job, by name."""
        return self.teacher.teachers if isinstance(self.teacher, Online) else {}

    def compared(self, data: DataSpec) -> str:
        """Name of the teacher of ``data`` that metrics and student starts go by: the only or the last one."""
        return next(reversed(self.live), "") if self.live else data.compared

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
        if self.live and any(data.answers for data in self.read):
            raise ValueError(f"phase {self.name!r}: its teacher is online, and its data rows alone: leave out pass_name and teachers")
        if self.teacher == "store" and not any(data.answers for data in self.data):
            raise ValueError(f"phase {self.name!r} learns from a teacher: give its data a pass_name, or the phase 'teacher: none'")
        if self.student.lora is not None and self.zero is not None:
            raise ValueError(f"phase {self.name!r}: lora trains on one rank or under DDP, where its few weights leave nothing to share out")
        if self.meta is not None and (self.meta.weight, self.meta.by_length) != (1.0, None):
            raise ValueError(f"phase {self.name!r}: meta is one split, read at random: leave out weight and by_length")
        return self


class CardSpec(Strict):
    """What a run cannot know of its students, for the metadata of their model cards."""

    license: str = Field(default="unknown", min_length=1)
    """Identifier as model hubs write it, such as apache-2.0; teacher and data may decide what is allowed."""
    base_model: str | None = None
    """Public name of the teacher's or the start's model."""
    datasets: tuple[str, ...] = ()
    """Public names of the data."""
    language: tuple[str, ...] = ()
    """Codes such as en."""


class TrainRecipe(Strict):
    """A whole run."""

    output: Path
    seed: int = Field(default=0, ge=0, lt=2**32)
    phases: tuple[PhaseSpec, ...] = Field(min_length=1)
    card: CardSpec = CardSpec()
    """Licence and public names, for the students' model cards."""

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
            for method in phase.methods:
                if method.carry is not None and method.carry not in earlier:
                    known = did_you_mean(method.carry, earlier) if earlier else ": it is the first"
                    raise ValueError(f"phase {phase.name!r}: {method.name} carries from {method.carry!r}, which is no earlier phase{known}")
            earlier.append(phase.name)
        return self

    def phase(self, name: str) -> PhaseSpec:
        """The phase called ``name``."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise ValueError(f"the recipe has no phase {name!r}{did_you_mean(name, [phase.name for phase in self.phases])}")
