"""Weights that transformers cuts into slices as it reads them: what FSDP2 and tensor parallelism share.

Each weight is laid out as a DTensor before anything is read, and then a rank reads its own slice alone, in the wanted dtype.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig


class Slices:
    """The weights of ``model``, some of them DTensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor

    def local_elements(self) -> int:
        return sum((weight.to_local() if isinstance(weight, DTensor) else weight).numel() for weight in self._model.parameters())


def read_slices(model_class: type, arguments: Mapping[str, Any], cut: DistributedConfig, device: torch.device) -> PreTrainedModel:
    """The model, of which each rank of the default process group reads its slices."""
    with _placing(device):
        model = model_class.from_pretrained(**arguments, distributed_config=cut)  # type: ignore[attr-defined]
    assert isinstance(model, PreTrainedModel)
    return model


@contextmanager
def _placing(device: torch.device) -> Iterator[None]:
    """transformers shards for the accelerator that torch was built for, even where the machine has none or the CPU is wanted."""
    built_for = torch._C._get_accelerator
    if built_for().type != device.type:
        torch._C._get_accelerator = lambda: device  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch._C._get_accelerator = built_for
