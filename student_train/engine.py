"""Training under ZeRO: DeepSpeed's engine, where transformers.Trainer has a wrapped model and an optimiser otherwise."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from online.ranks import Ranks
from online.zero3 import library
from student_train import checkpoint
from student_train.bundle import Bundle
from student_train.gradients import STILL
from student_train.use import Use, check_constant, check_steady, check_used, cut_groups
from student_train.zero import Zero, configuration


class Engine:
    """The optimiser of a run under ZeRO, and all that differs where weights or gradients lie in parts.

    Args:
        optimizer: A fresh one of torch's, over weights that are whole; DeepSpeed makes its parameters flat parts of them.
        looks: Which weights are used in some of the run's steps (``looked``).

    Raises:
        ValueError: an engine of this stage would move weights that a step does not use.
    """

    def __init__(
        self, zero: Zero, bundle: Bundle, optimizer: Optimizer, args: TrainingArguments, ranks: Ranks, looks: Sequence[frozenset[int]]
    ) -> None:
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))  # read by DeepSpeed, set by its own launcher only
        deepspeed = library(args.device)
        self._stage, self._bundle, self._base, self._rank = zero.stage, bundle, optimizer, args.process_index
        self._ranks, self._steady = ranks, looks[0] if looks and zero.stage == 3 else None
        if zero.stage == 3:
            check_constant(bundle, looks)
        cut_groups(optimizer, bundle, looks)
        self._weights = [name for name, _ in bundle.named_parameters()]
        self._names = _names(optimizer, bundle)
        self._use = Use(bundle.parameters())
        self._passes: list[list[int]] = []
        """The weights that got gradients in each backward pass since the last step."""
        self.model: Any = deepspeed.initialize(model=bundle, optimizer=optimizer, config=configuration(zero, bundle, args))[0]
        """What runs forward passes."""
        self._kept: list[tuple[Tensor, Tensor | None]] = []
        optimizer.register_step_pre_hook(self._set_aside)
        optimizer.register_step_post_hook(self._put_back)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimiser; their weights are flat parts."""
        groups: list[dict[str, Any]] = self._base.param_groups
        return groups

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a micro-batch, averaged over ranks; ``last`` says that a step follows."""
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss, scale_wrt_gas=False)
        self._passes.append(self._use.taken())

    def step(self) -> None:
        """Clip the gradients and move the weights, all ranks together; groups without gradient stand still, and those that are told to.

        Raises:
            ValueError: before any weight moves, on all ranks: this engine would move one that got no gradient.
        """
        passes, self._passes, step = self._passes, [], self.model.global_steps + 1
        used = check_used(passes, self._names, self._weights, self._ranks, step)
        if self._steady is not None:  # each pass: what the first one leaves out, later ones would add to an old gradient
            check_steady(passes, self._steady, self._weights, step)
        for group, moves in zip(self.param_groups, used, strict=True):
            group[STILL] = group.get(STILL, False) or not moves
        self.model.step()
        for group in self.param_groups:
            group[STILL] = False

    def zero_grad(self) -> None:
        """Nothing: a step ends without gradients."""

    def norm(self) -> float:
        """Of the whole gradient of the last step, before clipping."""
        return float(self.model.get_global_grad_norm())

    def _set_aside(self, optimizer: Optimizer, _arguments: object, _named: object) -> None:
        """torch's optimisers skip weights without gradient."""
        for group in optimizer.param_groups:
            if group.get(STILL):
                self._kept += [(weight, weight.grad) for weight in group["params"]]
                for weight in group["params"]:
                    weight.grad = None

    def _put_back(self, _optimizer: Optimizer, _arguments: object, _named: object) -> None:
        for weight, slope in self._kept:
            weight.grad = slope  # DeepSpeed goes on using it where it offloads
        self._kept = []

    # checkpoints

    def save(self, folder: Path) -> None:
        """Write what the optimiser knows of this rank's parts; weights are not among it."""
        groups = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        states = [self._base.state.get(part, {}) for part in self._parts]
        torch.save({"names": self._names, "groups": groups, "states": states}, folder / _file(self._rank))

    def load(self, folder: Path) -> None:
        """Go on from what ``save`` wrote; the weights must be those of the same checkpoint already.

        Raises:
            ValueError: it is of other groups of weights.
        """
        saved = torch.load(folder / _file(self._rank), map_location="cpu", weights_only=True)
        if saved["names"] != self._names:
            raise ValueError(f"{folder} was made with other parameter groups than this run's: give another output folder")
        self.model.global_steps = checkpoint.step_of(folder)
        for group, known in zip(self.param_groups, saved["groups"], strict=True):
            group.update(known)
        on_device = self._base.defaults.get("fused") or self._base.defaults.get("capturable")
        for part, state in zip(self._parts, saved["states"], strict=True):
            self._base.state[part] = {
                name: value.to(part.device) if torch.is_tensor(value) and (value.dim() or on_device) else value  # step counts are 0-d
                for name, value in state.items()
            }

    @property
    def _parts(self) -> Sequence[Tensor]:
        """The flat vectors that the optimiser moves on this rank."""
        inner = self.model.optimizer
        parts: Sequence[Tensor] = inner.fp32_partitioned_groups_flat if self._stage == 3 else inner.single_partition_of_fp32_groups
        return parts

    # weights

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """As ``checkpoint.weights``; under stage 3 all ranks gather them, and the first gets them, on the CPU."""
        if self._stage < 3:
            return checkpoint.weights(module)
        self.model.empty_partition_cache()  # of what was fetched ahead
        return checkpoint.weights(module, self._whole)

    def _whole(self, tensor: Tensor) -> Tensor:
        if not hasattr(tensor, "ds_tensor"):  # a buffer
            return tensor.detach()
        with library(tensor.device).zero.GatheredParameters([tensor]):
            return tensor.detach().to("cpu", copy=True) if self._rank == 0 else torch.empty(0)

    def end(self) -> None:
        """Give the bundle plain weights of its own again, whole on every rank, and take DeepSpeed out of it."""
        zero = library(self.model.device).zero
        self.model.empty_partition_cache()
        plain: dict[int, nn.Parameter] = {}
        for weight in self._bundle.parameters():
            with zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_tensor")):
                plain[id(weight)] = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        self._use.end()
        self.model.destroy()
        for module in self._bundle.modules():
            own = dict(module._parameters)
            module._parameters = {name: None if weight is None else plain[id(weight)] for name, weight in own.items()}


def _names(optimizer: Optimizer, bundle: Bundle) -> list[list[str]]:
    """The weights of each parameter group."""
    known = {id(weight): name for name, weight in bundle.named_parameters()}
    return [[known[id(weight)] for weight in group["params"]] for group in optimizer.param_groups]


def _file(rank: int) -> str:
    return f"optimizer_{rank}.pt"
