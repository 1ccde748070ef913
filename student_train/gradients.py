"""The parts of a student, the size of the gradient in each, and learning rates that methods change part by part."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from online.models import LoadedModel
from student_train.bundle import Bundle

PART = "part"
"""Entry of an optimiser's parameter group: number of the student's block, 0 for all else of the student."""
STILL = "still"
"""Entry of one: whether the next step leaves its weights, moments and step count as they are; read where gradients cannot be taken away."""


def parts(student: LoadedModel) -> dict[str, list[nn.Parameter]]:
    """Trainable weights by part: ``embeddings`` (all that comes before the first block), ``block.1`` ..., ``head`` (all others)."""
    blocks = [list(student.block(layer).parameters()) for layer in range(1, student.shape.layers + 1)]
    of_block = {id(weight): f"block.{layer}" for layer, weights in enumerate(blocks, 1) for weight in weights}
    found: dict[str, list[nn.Parameter]] = {"embeddings": [], **{f"block.{layer}": [] for layer in range(1, len(blocks) + 1)}, "head": []}
    outside = "embeddings"
    body = {id(weight) for weight in student.body.parameters()}
    for weight in student.model.parameters():
        if id(weight) in of_block:
            outside = "head"
        if weight.requires_grad:
            part = of_block.get(id(weight)) or (outside if id(weight) in body else "head")
            found[part].append(weight)
    return {part: weights for part, weights in found.items() if weights}


def norms(student: LoadedModel) -> dict[str, float]:
    """Part -> 2-norm of its gradient as it is now; 0 where a part has none."""
    found = {}
    for part, weights in parts(student).items():
        slopes = [weight.grad.float().norm() for weight in weights if weight.grad is not None]
        found[part] = float(torch.stack(slopes).norm()) if slopes else 0.0
    return found


def split_groups(optimizer: Optimizer, student: LoadedModel) -> None:
    """Cut the parameter groups of a fresh ``optimizer`` so that each is of one part, or of the methods (which has no PART)."""
    number: dict[int, int] = {}
    for part, weights in parts(student).items():
        number |= {id(weight): int(part.removeprefix("block.")) if part.startswith("block.") else 0 for weight in weights}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        of_part: dict[int | None, list[nn.Parameter]] = {}
        for weight in group["params"]:
            of_part.setdefault(number.get(id(weight)), []).append(weight)
        groups += [{**group, "params": weights, PART: part} for part, weights in of_part.items()]
    optimizer.param_groups[:] = groups


def check_terms(terms: Mapping[str, Tensor], step: str, store: Path) -> None:
    """Refuse loss terms that are not finite.

    Raises:
        ValueError: names one, the ``step`` and the ``store`` of its rows.
    """
    finite = torch.isfinite(torch.stack(list(terms.values()))).tolist()
    for name, sound in zip(terms, finite, strict=True):
        if not sound:
            raise ValueError(
                f"{step}: the loss term {name} is {terms[name].item()} on rows of {store}; "
                "nothing of this step is kept; try a lower learning_rate, or look at the rows with teacher-dump show"
            )


def check_norm(norm: float, step: int) -> float:
    """The norm of the whole gradient of ``step``; raises ValueError where it is not finite."""
    if not math.isfinite(norm):
        raise ValueError(
            f"step {step}: the gradient is {norm} though every loss term is finite; nothing of this step is kept; try a lower learning_rate"
        )
    return norm


class Gates(TrainerCallback):
    """For the length of an optimiser step, multiplies the learning rate of each part by what the methods' gates say.

    Parts with factor 0 are stepped over: neither weight decay nor moments touch them.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._rates: list[float] = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Optimizer, **_unused: object
    ) -> None:
        self._rates = [group["lr"] for group in optimizer.param_groups]
        gates = self._bundle.gates()
        for group in optimizer.param_groups:
            if group[PART] is not None:
                _gate(group, gates)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Optimizer, **_unused: object
    ) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate


def _gate(group: dict[str, Any], gates: Mapping[int, float]) -> None:
    factor = gates.get(group[PART], 1.0)
    group["lr"] *= factor
    if factor == 0:
        group[STILL] = True
        for weight in group["params"]:
            weight.grad = None
