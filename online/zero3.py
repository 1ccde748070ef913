"""A model whose weights lie in parts over the ranks (ZeRO-3, arXiv:1910.02054): DeepSpeed's engine without an optimizer.

Each rank runs rows of its own; a module's weights are gathered just before it runs and let go after it. The ranks step together.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from online.offload import check_offloaded, prepare_offload
from online.sharding import Loaded, Sharding, ShardingError
from online.skeleton import largest_block, largest_parameter, load_skeleton, refuse_random_head

_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class Partitioned:
    """Weights in equal parts over the ranks of the default process group."""

    together: ClassVar[bool] = True

    def __init__(self, engine: nn.Module) -> None:
        self._engine = engine

    def whole(self, tensor: Tensor) -> Tensor:
        import deepspeed

        if not hasattr(tensor, "ds_tensor"):  # a buffer: every rank has it
            return tensor
        lying: Any = tensor
        engine: Any = self._engine
        if lying.ds_status.name == "INFLIGHT":  # fetched ahead for a block that did not run after all
            engine.empty_partition_cache()
        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()

    def calling(self, module: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()  # DeepSpeed's hooks gather for every module that runs, from within the model or not

    def joined(self, value: Tensor, width: int) -> Tensor:
        return value

    def columns(self, module: nn.Module) -> None:
        return None

    def local_elements(self) -> int:
        """Without the padding that makes all parts equally long."""
        weights: list[Any] = list(self._engine.parameters())
        return sum(
            max(0, min(weight.ds_tensor.ds_numel, weight.ds_numel - weight.ds_tensor.ds_numel * weight.ds_zero_partition_rank))
            for weight in weights
        )


def load_zero3(model_class: type, arguments: Mapping[str, Any], sharding: Sharding, device: torch.device) -> Loaded:
    """Load a model in parts, so that no rank holds all of it at any time.

    Raises:
        ShardingError: DeepSpeed is not installed, a random head, or an offload that cannot be.
    """
    deepspeed = library(device)
    skeleton, report = load_skeleton(model_class, arguments)
    refuse_random_head(arguments, report)
    config = _configuration(skeleton, arguments["dtype"], sharding, device)
    with _partitioning(config):
        model: PreTrainedModel = model_class.from_pretrained(**arguments)  # type: ignore[attr-defined]
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    engine = deepspeed.initialize(model=model.requires_grad_(False), config=config)[0]
    engine.eval()
    check_offloaded(model, sharding, device)
    return model, report, Partitioned(engine)


def _configuration(skeleton: PreTrainedModel, dtype: torch.dtype, sharding: Sharding, device: torch.device) -> dict[str, Any]:
    # By default DeepSpeed holds up to 1e9 elements: the whole of many models. What must be there at once is the module that runs, at
    # worst the word embedding or head. Half a block more hides the gathering behind the computing; prefetch takes whole parameters,
    # so that it may overshoot by one. Nothing is kept for reuse: a forward pass needs each block once.
    block, largest = largest_block(skeleton), largest_parameter(skeleton)
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_max_live_parameters": block // 2 + largest,
        "stage3_prefetch_bucket_size": block // 2,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0,
        "memory_efficient_linear": False,  # would replace torch's linear function for every other model of this process
    }
    if sharding.offload != "none":
        zero["offload_param"] = prepare_offload(sharding, skeleton, device)
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    if dtype in _PRECISIONS:
        config[_PRECISIONS[dtype]] = {"enabled": True}
    return config


@contextmanager
def _partitioning(config: dict[str, Any]) -> Iterator[None]:
    """Inside, transformers partitions what it loads; a student made later is whole again."""
    held = HfDeepSpeedConfig(config)  # transformers refers to it weakly
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del held


def library(device: torch.device) -> ModuleType:
    """DeepSpeed, silent, and without C++ operators that it would compile in the middle of a run."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index or 0)  # where DeepSpeed puts this rank's weights
    try:
        import deepspeed
    except ImportError as error:
        raise ShardingError(
            "ZeRO (a teacher's sharding: kind zero3, a student's zero) needs DeepSpeed, which is not installed; "
            "run `pip install 'teachercache[sharded]'`"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
