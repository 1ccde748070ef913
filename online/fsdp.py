"""A model that lies in slices over the ranks of the default process group, each block gathered while it runs: PyTorch's FSDP2.

Source: Zhao et al. 2023, PyTorch FSDP; torch.distributed.fsdp.fully_shard.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from online.sharding import Loaded, Sharding
from online.skeleton import load_skeleton, refuse_random_head
from online.slices import Slices, read_slices


class Gathered(Slices):
    """Weights that FSDP2 gathers for as long as the module that holds them runs."""

    together: ClassVar[bool] = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]  # the model itself first
        self._units[0]._get_fsdp_state()._lazy_init()  # or a block that is called before the model would take itself for all of it
        model.register_forward_hook(self._release, always_call=True)

    @contextmanager
    def calling(self, module: nn.Module) -> Iterator[None]:
        weights = {id(weight) for weight in module.parameters()}
        holders = [unit for unit in self._units if any(id(weight) in weights for weight in cast(nn.Module, unit).parameters())]
        for unit in holders:
            unit.unshard()
        try:
            yield
        finally:
            for unit in holders:
                unit.reshard()

    def joined(self, value: Tensor, width: int) -> Tensor:
        return value

    def columns(self, module: nn.Module) -> None:
        return None

    def _release(self, model: nn.Module, args: object, output: object) -> None:
        """FSDP2 keeps the outermost unit and tied word embeddings for a backward pass, which never comes here."""
        if output is None:  # the pass failed half-way, for want of memory for instance
            self._units[0].reset_iter_state()
        for unit in self._units:
            unit.reshard()


def load_fsdp(model_class: type, arguments: Mapping[str, Any], sharding: Sharding, device: torch.device) -> Loaded:
    """Load a model of any family. While it runs, a rank holds its slices, the block that runs and the next, and tied word embeddings.

    Raises:
        ValueError: a random head.
    """
    skeleton, report = load_skeleton(model_class, arguments)
    refuse_random_head(arguments, report)
    config = copy.deepcopy(arguments["config"])
    config.base_model_fsdp_plan = dict.fromkeys(_units(skeleton), "free_full_weight")
    model = read_slices(model_class, {**arguments, "config": config}, DistributedConfig(fsdp_size=sharding.size), device)
    return model, report, Gathered(model)


def _units(skeleton: PreTrainedModel) -> list[str]:
    """What is gathered at once, as paths from the base model with ``*`` for numbers: each block, and the word embeddings.

    All the rest is one more unit. Heads with a plan of transformers' own, and word embeddings tied to them, are units too.
    """
    parts = dict(skeleton.base_model.named_modules())
    lists = [name for name, module in parts.items() if isinstance(module, nn.ModuleList)]
    blocks = [f"{name}.*" for name in lists if not re.search(r"\.\d", name)]  # a list inside a block is no list of blocks
    return blocks + [name for name, module in parts.items() if module is skeleton.get_input_embeddings()]
