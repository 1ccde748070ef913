"""Which weights a training step uses: whatever got no gradient must stand still, and an engine that cannot do that must refuse.

DDP leaves weights without gradient alone. ZeRO 1 and 2 hand the optimiser a gradient of 0 for them, so that moments and decay would move
them; ZeRO-3 hands it that of an earlier step. So parameter groups are cut until a step uses all of a group or nothing.
"""

import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from online.ranks import Ranks
from student_train.bundle import Bundle
from student_train.data import Failed, MicroBatches
from student_train.gradients import PART, parts
from student_train.micro_batch import MicroBatch
from student_train.moment import Moment
from student_train.random_state import random_state_kept

LOOKS = 5
"""Moments of a run at which its first rows are tried."""


class Use:
    """The weights that get a gradient, in the order in which they do; ``drop`` lets go of each gradient at once."""

    def __init__(self, weights: Iterable[nn.Parameter], *, drop: bool = False) -> None:
        self._drop = drop
        self._order: list[int] = []
        self._handles = [
            weight.register_post_accumulate_grad_hook(partial(self._note, number))
            for number, weight in enumerate(weights)
            if weight.requires_grad
        ]

    def _note(self, number: int, weight: torch.Tensor) -> None:
        self._order.append(number)
        if self._drop:
            weight.grad = None

    def taken(self) -> list[int]:
        """Numbers of the weights since the last call."""
        order, self._order = self._order, []
        return order

    def end(self) -> None:
        """Look no more."""
        for handle in self._handles:
            handle.remove()


def looked(
    bundle: Bundle, data: MicroBatches, written: Callable[[MicroBatch | Failed], MicroBatch], seed: int, device: torch.device
) -> list[frozenset[int]]:
    """Which weights of ``bundle`` (numbers in the order of its parameters) the first rows of each source use, at moments all over the run.

    Nothing is left of it: no change of a buffer, no random number drawn, and no gradient, of which there is never more than one.
    """
    kept = [(buffer, buffer.clone()) for buffer in bundle.buffers()]
    found, training, use = [], bundle.training, Use(bundle.parameters(), drop=True)
    firsts = [written(data[number]).to(device) for number in data.firsts()]
    bundle.train()
    with random_state_kept():
        for look in range(LOOKS):
            bundle.begin(Moment(look * max(0, data.steps - 1) // (LOOKS - 1), data.steps, data.epoch_steps, seed))
            if bundle.looks_back():  # such steps use no other weights
                continue
            for item in firsts:
                _backward(bundle, data, item)
                found.append(frozenset(use.taken()))
    use.end()
    bundle.train(training)
    with torch.no_grad():
        for buffer, before in kept:
            buffer.copy_(before)
    return found


def _backward(bundle: Bundle, data: MicroBatches, item: MicroBatch) -> None:
    with torch.no_grad():
        features = data.sources[item.source].answers(item.batch, item.fetched)
        meta = None
        if item.meta is not None and data.meta is not None:
            meta = item.meta.batch, data.meta.answers(item.meta.batch, item.meta.fetched)
    loss, _ = bundle(item.batch, features, bundle.counts(item.batch, item.taught), item.taught, meta)
    if loss.requires_grad:
        loss.backward()


def cut_groups(optimizer: Optimizer, bundle: Bundle, looks: Sequence[frozenset[int]]) -> None:
    """Cut the parameter groups of a fresh ``optimizer``: each is of one part of the student, or of one method, and used at the same
    ``looks``.

    PART of a group is the student's block, 0 for all else of the student.
    """
    owner: dict[int, tuple[str, int | None]] = {}
    for part, weights in parts(bundle.loaded).items():
        number = int(part.removeprefix("block.")) if part.startswith("block.") else 0
        owner |= {id(weight): (part, number) for weight in weights}
    for name, weight in bundle.methods.named_parameters():
        owner.setdefault(id(weight), (name.partition(".")[0], None))
    when = {id(weight): tuple(number in look for look in looks) for number, weight in enumerate(bundle.parameters())}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        cut: dict[object, list[nn.Parameter]] = {}
        for weight in group["params"]:
            cut.setdefault((owner[id(weight)], when[id(weight)]), []).append(weight)
        groups += [{**group, "params": weights, PART: owner[id(weights[0])][1]} for weights in cut.values()]
    optimizer.param_groups[:] = groups


def check_constant(bundle: Bundle, looks: Sequence[frozenset[int]]) -> None:
    """Refuse, for an engine that needs every step to use the same weights, a run that does not.

    Raises:
        ValueError: names a weight and what would serve.
    """
    names = [name for name, _ in bundle.named_parameters()]
    changing = sorted(frozenset[int]().union(*looks) - looks[0].intersection(*looks)) if looks else []
    if changing:
        raise ValueError(
            f"zero: stage 3: some steps learn {names[changing[0]]} and others do not ({len(changing)} weights in all), and ZeRO-3 would "
            "move it by the gradient of an earlier step; give zero a stage of 1 or 2, or leave zero out (DDP)"
        )


def check_steady(passes: Sequence[Sequence[int]], steady: frozenset[int], names: Sequence[str], step: int) -> None:
    """Refuse a step of which a backward pass uses other weights than ``steady``, those of all steps.

    Raises:
        ValueError: names one.
    """
    for numbers in passes:
        if other := steady.symmetric_difference(numbers):
            raise ValueError(
                f"zero: stage 3: step {step} learns other weights than the first ones did ({names[min(other)]}), and ZeRO-3 would move "
                "some by the gradient of an earlier step; nothing of this step is kept; give zero a stage of 1 or 2, or leave it out (DDP)"
            )


def check_used(
    passes: Sequence[Sequence[int]], groups: Sequence[Sequence[str]], names: Sequence[str], ranks: Ranks, step: int
) -> list[bool]:
    """Which ``groups`` of weights a step has used, where ``passes`` says which of ``names`` got gradients on this rank; a collective.

    Raises:
        ValueError: on every rank, where the ranks have gone different ways, or a group is used in part.
    """
    way = zlib.crc32(repr([list(numbers) for numbers in passes]).encode())
    most, least = ranks.largest([way, -way])
    if most != -least:
        raise ValueError(
            f"step {step}: ranks went backward through different weights (this is rank {ranks.number}), and what they summed up is of no "
            "use; nothing of this step is kept; leave zero out (DDP), which allows that"
        )
    used = {names[number] for numbers in passes for number in numbers}
    found = []
    for group in groups:
        idle = [name for name in group if name not in used]
        if idle and len(idle) < len(group):
            moving = next(name for name in group if name in used)
            raise ValueError(
                f"step {step}: {moving} got a gradient and {idle[0]} did not, though earlier both or neither did: ZeRO moves them "
                "together; nothing of this step is kept; leave zero out (DDP), which moves each by itself"
            )
        found.append(not idle)
    return found
