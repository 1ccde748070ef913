"""A phase of training on paper: student and teachers without data, and what a micro-batch takes of them, counted by running them so.

Shapes: B rows, T padded tokens, N labelled tokens.
"""

import copy
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

from online.allocations import Allocations, blank_batch
from online.batch import Batch
from online.flops import ForwardFlops, forward_flops
from online.machines import Dtype
from online.models import ModelSpec, check_length, load_config
from online.sizes import Sizes
from online.skeleton import of_config
from online.teacher import LiveTeacher
from online.words import Words, each
from store.features import FeatureKey
from store.intervention import Intervention
from store.shape import ModelShape
from store.table import Ints
from student_train.arguments import checkpoints_student
from student_train.live import plain
from student_train.outline import Outline
from student_train.step import run

ATTENTION = ("attention_scores", "attention_probs")


@dataclass(frozen=True)
class Rows:
    """What micro-batches are made of."""

    lengths: Ints
    """Padded tokens of rows, ascending."""
    share: float
    """Labelled tokens of each token."""

    @property
    def longest(self) -> int:
        """Padded tokens of the longest row."""
        return int(self.lengths[-1])

    def mean(self, rows: int) -> float:
        """Padded tokens of each of so many rows drawn at random: all are as long as the longest of them."""
        below = (np.arange(len(self.lengths) + 1) / len(self.lengths)) ** rows
        return float(self.lengths @ np.diff(below))

    def labels(self, rows: int, tokens: float) -> int:
        """N, of so many rows with so many tokens."""
        return math.ceil(rows * tokens * self.share)


@dataclass(frozen=True)
class Model:
    """A model without its weights."""

    sizes: Sizes
    flops: ForwardFlops
    keys: frozenset[FeatureKey]
    """What is read of it."""
    intervention: Intervention | None = None

    @property
    def dtype(self) -> Dtype:
        """What it computes in."""
        name: Dtype = {torch.bfloat16: "bfloat16", torch.float16: "float16"}.get(self.sizes.loaded.model.dtype, "float32")  # type: ignore[assignment]
        return name

    @property
    def runs(self) -> int:
        """Forward passes for an answer."""
        return 1 if self.intervention is None else 2

    def operations(self, rows: int, tokens: float, labelled: int) -> float:
        """Of a forward pass over ``rows`` of ``tokens`` padded tokens each."""
        counts = {"all": rows * tokens, "mean": rows * tokens, "masked": labelled, "labels": labelled}
        words = sum(counts.get(positions, rows) for positions in {key.positions for key in self.keys if key.site == "lm_logits"})
        each = self.flops.token * tokens + self.flops.pair * tokens**2 + self.flops.row
        return self.runs * (rows * each + self.flops.word * words)


@dataclass(frozen=True)
class Working:
    """Bytes that a micro-batch takes beside the weights, gradients and moments."""

    teachers: float
    """While the teachers answer, one after the other: activations of one, features of those before it."""
    features: float
    """Answers, and weights that they are derived with: there while the student learns."""
    student: float
    """Activations, with captured features and their gradients, at most; no gradient of a weight stays."""
    learning: float
    """The same with the gradients of the weights as they come."""


@dataclass(frozen=True)
class Paper:
    """Student and teachers of a phase."""

    outline: Outline
    student: Model
    teachers: dict[str, Model]
    """Those at work in the job, by name; none where a store answers."""
    stored: dict[str, ModelShape]
    """Shapes of those whose answers come from a store."""
    _fake: FakeTensorMode
    _known: dict[tuple[int, int, int], Working] = field(default_factory=dict)

    @property
    def present(self) -> list[Sizes]:
        """The models of the teachers; two names may share one."""
        return list({id(model.sizes): model.sizes for model in self.teachers.values()}.values())

    @cached_property
    def own(self) -> int:
        """Parameters of the methods, elements of float32."""
        return sum(weight.numel() for _, method in self.outline.methods for weight in method.parameters())

    @property
    def half(self) -> bool:
        """Whether the student computes in bfloat16 under autocast."""
        return bool(self.outline.phase.trainer.get("bf16"))

    @property
    def computes(self) -> Dtype:
        """What the student computes in."""
        return "bfloat16" if self.half else self.student.dtype

    @property
    def recomputes(self) -> bool:
        """Whether activations of the student are computed again in the backward pass."""
        return checkpoints_student(self.outline.phase.trainer)

    def working(self, rows: int, tokens: int, labelled: int) -> Working:
        """What a micro-batch of ``rows`` takes, all of ``tokens`` padded tokens, ``labelled`` of them labelled.

        Teachers and student are run on tensors without data. What losses make of the student's features is taken to be what a
        divergence of softmaxes makes of them; forward passes of a method's own are left out.
        """
        if (rows, tokens, labelled) not in self._known:
            with self._fake, torch.inference_mode(False):
                paired = any(model.intervention is not None for model in self.teachers.values())
                batch = blank_batch(rows + rows % 2 if paired else rows, tokens, labelled, paired)
                teachers = kept = 0.0
                for model in self.teachers.values():
                    peak, stays = _answers(model, batch)
                    teachers, kept = max(teachers, kept + peak), kept + stays
                student, learning = (self._learns(batch, gradients) for gradients in (False, True))
            features = kept + sum(feature_bytes(key, self.stored[name], rows, tokens, labelled) for name, key in self._read())
            self._known[rows, tokens, labelled] = Working(teachers, features, student, learning)
        return self._known[rows, tokens, labelled]

    def _read(self) -> Iterable[tuple[str, FeatureKey]]:
        return ((name, key) for name in self.stored for key in self.outline.method_keys.get(name, ()))

    def _learns(self, batch: Batch, gradients: bool) -> int:
        """Peak bytes of a forward and a backward pass; ``gradients`` of weights count as they come, or are there before."""
        loaded = self.student.sizes.loaded
        weights = list(loaded.model.parameters())
        for weight in weights:
            weight.grad = None if gradients else torch.zeros_like(weight)
        present = [*weights, *(weight.grad for weight in weights if weight.grad is not None)]
        loaded.model.train()
        with Allocations([*present, *_tensors(batch), *loaded.model.buffers()]) as made:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
                values = [value for value in run(loaded, batch, self.student.keys).values() if isinstance(value, Tensor | Words)]
            losses = [(each(_divergence, value) if isinstance(value, Words) else _divergence(value.float())).sum() for value in values]
            if losses:
                torch.stack(losses).sum().backward()
        for weight in weights:
            weight.grad = None
        return made.peak


def on_paper(outline: Outline) -> Paper:
    """The models of ``outline``, of which only configurations are read.

    Raises:
        ValueError: a model lacks a feature, or is of an unknown family.
    """
    blueprint, live = outline.blueprint, outline.phase.live
    student_keys = frozenset[FeatureKey]().union(*(method.student_keys for _, method in outline.methods))
    fake = FakeTensorMode()
    with fake:
        spec = ModelSpec(
            model=blueprint.source.folder,
            head=blueprint.head,
            dtype=blueprint.spec.dtype,
            modules=blueprint.custom,
            trust_remote_code=blueprint.custom is not None,
        )
        student = Model(*_made(spec, blueprint.config), student_keys)
        made: dict[str, tuple[Sizes, ForwardFlops]] = {}
        for name, one in live.items():
            twin = next((other for other in made if plain(live[other]) == plain(one)), None)
            made[name] = _made(one, load_config(one.model, one.trust_remote_code)) if twin is None else made[twin]
    keys = outline.method_keys
    teachers = {name: Model(*of, keys.get(name, frozenset()), live[name].intervention) for name, of in made.items()}
    if student.sizes.loaded.model.supports_gradient_checkpointing and checkpoints_student(outline.phase.trainer):
        _checkpoint(student)
    stored = {} if live or outline.phase.teacher == "none" else outline.teachers
    return Paper(outline, student, teachers, stored, fake)


def check_rows(paper: Paper, rows: Rows) -> None:
    """Refuse rows that a model cannot take; raises ValueError."""
    for model in (paper.student, *paper.teachers.values()):
        check_length(model.sizes.loaded, rows.longest)


def feature_bytes(key: FeatureKey, shape: ModelShape, rows: int, tokens: int, labelled: int) -> int:
    """Bytes of a float32 feature of ``shape``'s model in a micro-batch; of the likeliest words their ids too.

    Word logits are those that a store derives from what the head takes in, a few at a time: that, and the head's weight.
    """
    if key.site in ATTENTION:
        return 4 * rows * shape.heads * tokens**2
    units = {"all": rows * tokens, "masked": labelled, "labels": labelled}.get(key.positions, rows)
    if key.site == "lm_logits" and not key.form:
        return 4 * min(units * shape.vocab, (units + shape.vocab) * shape.width_of("head_input"))
    words = re.fullmatch(r"top(\d+)", key.form)
    each = 12 * int(words[1]) + 4 if words else 4 * shape.unit_width(key)
    return units * each


def _divergence(value: Tensor) -> Tensor:
    return F.kl_div(value.log_softmax(-1), torch.zeros_like(value), reduction="none").sum(-1)


def _made(spec: ModelSpec, config: PreTrainedConfig) -> tuple[Sizes, ForwardFlops]:
    config = copy.deepcopy(config)
    if spec.labels is not None:
        config.num_labels = spec.labels
    flops = forward_flops(config, spec.head, spec.modules, spec.trust_remote_code)
    return Sizes(of_config(spec, config)), flops


def _checkpoint(student: Model) -> None:
    model = student.sizes.loaded.model
    new_name = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if new_name else model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": False})


def _answers(model: Model, batch: Batch) -> tuple[int, int]:
    """Most bytes while a teacher answers ``batch``, and those that stay: the features, and weights that they are derived with."""
    loaded = model.sizes.loaded
    live = LiveTeacher(loaded, model.keys, intervention=model.intervention)
    with Allocations([*loaded.model.parameters(), *loaded.model.buffers(), *_tensors(batch)]) as made:
        features = live.features(batch, {})
    stay = made.now
    del features
    return made.peak, stay


def _tensors(batch: Batch) -> list[Tensor]:
    return [value for value in tree_leaves(vars(batch)) if isinstance(value, Tensor)]
