"""A model of which each rank of the default process group computes a part of every matrix product, for the same rows.

Source: Shoeybi et al. 2019, Megatron-LM, section 3; the plans and their modules are transformers'.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from online.families import FAMILIES
from online.sharding import Columns, Loaded, Sharding, ShardingError
from online.skeleton import load_skeleton, refuse_random_head
from online.slices import Slices, read_slices


class Split(Slices):
    """Weights that no rank ever needs as a whole: each works with its own slice, and the results are summed or gathered."""

    together: ClassVar[bool] = False

    def calling(self, module: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def joined(self, value: Tensor, width: int) -> Tensor:
        if value.shape[-1] == width:
            return value
        mesh = next(weight.device_mesh for weight in self._model.parameters() if isinstance(weight, DTensor))
        shape = torch.Size((*value.shape[:-1], width))  # said, because the last rank may have fewer
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(value.contiguous(), mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride).full_tensor()

    def columns(self, module: nn.Module) -> Columns | None:
        weight = module.weight
        if not isinstance(weight, DTensor):
            return None
        return Columns(min(dist.get_rank() * -(-len(weight) // dist.get_world_size()), len(weight)), _gathered)


def load_tp(model_class: type, arguments: Mapping[str, Any], sharding: Sharding, device: torch.device) -> Loaded:
    """Load a model whose heads are dealt out to the ranks in their order.

    Raises:
        ShardingError: a random head, heads that cannot be dealt out evenly, or an architecture that cannot be split so.
    """
    config = arguments["config"]
    check_heads(config, sharding.size)
    skeleton, report = load_skeleton(model_class, arguments)
    refuse_random_head(arguments, report)
    family = FAMILIES.get(config.model_type)
    plan = {} if family is None or family.split is None else _plan(skeleton, *family.split)
    heads = {name: "colwise" for name, module in skeleton.named_modules() if module is skeleton.get_output_embeddings()}
    plan |= heads  # transformers' own plans gather the logits of all words on every rank
    model = read_slices(model_class, arguments, DistributedConfig(tp_size=sharding.size, tp_plan=plan or None), device)
    return model, report, Split(model)


def check_heads(config: PreTrainedConfig, size: int) -> None:
    """Refuse a model whose heads cannot be dealt out to ``size`` ranks.

    Raises:
        ShardingError: one matrix for query, key and value, two for words, or numbers of heads that ``size`` does not divide.
    """
    family = FAMILIES.get(config.model_type)
    if family is not None and len(family.projections) == 1:
        raise ShardingError(
            f"{config.model_type} keeps query, key and value in one matrix, which tensor parallelism cannot deal out by heads; "
            "expected sharding.kind zero3 or fsdp"
        )
    if family is not None and family.head_rest is not None:
        raise ShardingError(
            f"{config.model_type} multiplies words with two matrices at once, for which tensor parallelism has no plan; expected "
            "sharding.kind zero3 or fsdp"
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if heads is not None and heads % size:
            raise ShardingError(
                f"sharding.size {size} does not divide {name} {heads}, and tensor parallelism deals out whole heads; expected a divisor, "
                "or sharding.kind zero3 or fsdp"
            )


def _gathered(value: Tensor) -> Tensor:
    found = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(found, value.contiguous())
    return torch.stack(found)


def _plan(model: PreTrainedModel, columns: tuple[str, ...], rows: tuple[str, ...]) -> dict[str, str]:
    """transformers' plan for a model that comes without one: ``columns`` split their outputs, ``rows`` their inputs, words by number."""
    names = {module: name for name, module in model.named_modules()}
    block = ".".join(filter(None, (names[model.base_model], FAMILIES[model.config.model_type].block.format(i="*"))))
    plan = {f"{block}.{name}": "colwise" for name in columns} | {f"{block}.{name}": "rowwise" for name in rows}
    plan[names[model.get_input_embeddings()]] = "embedding_rowwise"
    if (head := model.get_output_embeddings()) is not None and (bias := model.all_tied_weights_keys.get(f"{names[head]}.bias")) is not None:
        plan[bias] = "colwise"  # a parameter beside the layer that uses it
    return plan
