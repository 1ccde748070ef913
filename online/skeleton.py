"""A model without its weights: its modules and shapes, and how the weights on disk fit them."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict

from online.families import attention_implementation
from online.models import HEADS, LoadedModel, ModelSpec
from online.sharding import ShardingError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def of_config(spec: ModelSpec, config: PreTrainedConfig) -> LoadedModel:
    """The model that ``config`` describes, in eval mode, with random weights or, under a context of meta or fake tensors, without any.

    Its shape and wiring are those of the model that ``spec`` loads. ``config`` becomes the model's own.

    Raises:
        ValueError: an unknown family, or a head that the family lacks.
    """
    if config.pad_token_id is None and spec.head == "classification":
        config.pad_token_id = 0
    settings = {"dtype": getattr(torch, spec.dtype), "attn_implementation": attention_implementation(config.model_type)}
    model = HEADS[spec.head].from_config(config, trust_remote_code=spec.trust_remote_code, **settings)  # type: ignore[attr-defined]
    return LoadedModel.of(model.eval(), spec.head, custom=spec.modules)


def load_skeleton(model_class: type, arguments: Mapping[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What ``model_class.from_pretrained(**arguments)`` would load, on the meta device, and its loading info.

    Sharded ways of loading report no weights that do not fit, and some of those that are missing wrongly. Here transformers
    matches names and shapes as it does for one process, from the headers of the files: no weights are read.

    Raises:
        OSError: no safetensors weights in the folder.
        RuntimeError: a weight of another shape, unless ``ignore_mismatched_sizes``.
    """
    config = copy.deepcopy(arguments["config"])
    with torch.device("meta"):
        made = model_class.from_config(  # type: ignore[attr-defined]
            copy.deepcopy(config), trust_remote_code=arguments.get("trust_remote_code", False)
        )
    given = {
        **arguments,
        "config": config,
        "pretrained_model_name_or_path": None,
        "state_dict": _headers(Path(arguments["pretrained_model_name_or_path"])),
        "device_map": "meta",
        "output_loading_info": True,
    }
    model, report = type(made).from_pretrained(**given)
    return model, report


def refuse_random_head(arguments: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Refuse weights that no two ranks would draw alike.

    Raises:
        ShardingError: a new head is to start with random weights.
    """
    lacking = set(report["missing_keys"]) | {entry[0] for entry in report["mismatched_keys"]}
    random = {name for name in lacking if not name.startswith("pooler.")}
    if arguments.get("ignore_mismatched_sizes") and random:
        raise ShardingError(
            f"new_head: true would draw {min(random)} at random, and every replica another one; train and save the head first, "
            "or run it with sharding: {kind: none}"
        )


def largest_parameter(skeleton: nn.Module) -> int:
    """Elements of the largest parameter: of the word embedding or head, or a projection."""
    return max(weight.numel() for weight in skeleton.parameters())


def largest_block(skeleton: nn.Module) -> int:
    """Elements of the largest of the modules that a model stacks."""
    blocks = (block for module in skeleton.modules() if isinstance(module, nn.ModuleList) for block in module)
    return max((sum(weight.numel() for weight in block.parameters()) for block in blocks), default=0)


def _headers(folder: Path) -> dict[str, Tensor]:
    """The weights of a model folder as meta tensors."""
    if (folder / _SINGLE).is_file():
        files = [_SINGLE]
    elif (folder / _INDEX).is_file():
        files = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        raise OSError(f"it has neither {_SINGLE} nor {_INDEX}")
    return {name: tensor for file in files for name, tensor in load_state_dict(folder / file, map_location="meta").items()}
