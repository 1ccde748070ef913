"""How a model lies over several processes: what a recipe says of it, and how the rest of the code reads its weights."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from store.strict import Strict

Kind = Literal["auto", "none", "zero3", "fsdp", "tp"]


class Sharding(Strict):
    """How many ranks hold one copy of a model together, and in which way. A job has as many copies as its ranks make up."""

    kind: Kind = "none"
    """auto: none where a GPU has room for the weights, or there is no GPU, and otherwise zero3 over as few ranks as hold them.
    none: every rank holds all of it. zero3 (DeepSpeed) and fsdp (FSDP2) gather one block after the other while every rank answers
    rows of its own: for every family. tp splits each matrix, and all ranks of a copy work on the same rows: families with a plan."""
    size: int = Field(default=1, ge=1)
    """Ranks that hold one copy."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where a rank keeps its part while no block of it is in use; zero3 only."""
    offload_folder: Path | None = None
    """Folder on a local disk for ``offload: nvme``."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind in ("auto", "none") and self.size > 1:
            raise ValueError(f"size {self.size} with kind {self.kind}: expected one of the kinds zero3, fsdp and tp, or size 1")
        if self.kind in ("fsdp", "tp") and self.size == 1:
            raise ValueError(f"kind {self.kind} with size 1: expected the number of ranks that hold one copy together, such as size 2")
        if self.offload != "none" and self.kind != "zero3":
            raise ValueError(f"offload: {self.offload} needs kind: zero3, found {self.kind}")
        if (self.offload == "nvme") != (self.offload_folder is not None):
            raise ValueError("offload_folder: expected a folder with offload: nvme, and none otherwise")
        return self


class ShardingError(ValueError):
    """A model cannot lie over the ranks as it is asked to."""


class Columns(NamedTuple):
    """Of outputs that are split over the ranks: those of this one."""

    first: int
    gathered: Callable[[Tensor], Tensor]
    """[M, n] of this rank -> [R, M, n] of all R ranks, in their order."""


class Weights(Protocol):
    """The weights of a loaded model. Whatever is sharded is gathered by all ranks at once."""

    together: ClassVar[bool]
    """Whether ranks with rows of their own must call each module equally often."""

    def whole(self, tensor: Tensor) -> Tensor:
        """A parameter or buffer of the model as a whole; the live tensor itself where it is not sharded, otherwise a detached copy."""
        ...

    def calling(self, module: nn.Module) -> AbstractContextManager[None]:
        """Inside, ``module`` may be called on its own, outside of the model's forward pass."""
        ...

    def joined(self, value: Tensor, width: int) -> Tensor:
        """``value`` [..., w] as it left a module whose outputs are split over the ranks, [..., width]; itself where w is the width."""
        ...

    def columns(self, module: nn.Module) -> "Columns | None":
        """Which of its outputs a linear layer gives on this rank; None where it gives all."""
        ...

    def local_elements(self) -> int:
        """Elements of parameters that this rank holds."""
        ...


class Whole:
    """Weights that are all here."""

    together: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor

    def calling(self, module: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def joined(self, value: Tensor, width: int) -> Tensor:
        return value

    def columns(self, module: nn.Module) -> None:
        return None

    def local_elements(self) -> int:
        return sum(weight.numel() for weight in self._model.parameters())


Loaded = tuple[PreTrainedModel, dict[str, Any], Weights]
"""A model in eval mode on its device, from_pretrained's loading info (missing_keys, mismatched_keys, ...), and its weights."""


def loader(kind: Kind) -> Callable[[type, Mapping[str, Any], Sharding, torch.device], Loaded]:
    """The function that loads a model sharded in this way: of a model class, from_pretrained's arguments, the sharding and a device."""
    if kind == "zero3":
        from online.zero3 import load_zero3

        return load_zero3
    if kind == "fsdp":
        from online.fsdp import load_fsdp

        return load_fsdp
    if kind == "tp":
        from online.tensor_parallel import load_tp

        return load_tp
    return _load_whole


def _load_whole(model_class: type, arguments: Mapping[str, Any], sharding: Sharding, device: torch.device) -> Loaded:
    model, report = model_class.from_pretrained(**arguments, output_loading_info=True)  # type: ignore[attr-defined]
    return model if "device_map" in arguments else model.to(device), report, Whole(model)
