"""Teachers with quantised weights, as transformers loads them: by what the folder says of itself, or by a configuration in the recipe.

The model runs as transformers quantised it. What ships of its weights (the head, norms, projections) is float: a layer's weight is what it
makes of the unit vectors, whatever its way to keep it.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

from online.sharding import Sharding, ShardingError, Whole


class Quantised(Whole):
    """Weights that are all here, some of them quantised."""

    def whole(self, tensor: Tensor) -> Tensor:
        """The tensor itself; one that is kept in parts (torchao's) as plain floats."""
        return tensor.dequantize() if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "dequantize") else tensor


def quantisation(
    given: Mapping[str, object], config: PreTrainedConfig, sharding: Sharding | None, device: torch.device | None
) -> dict[str, Any]:
    """Further arguments of from_pretrained for a teacher that is, or is to be, quantised; none for others.

    Raises:
        ValueError: an unknown method or option of transformers', or its package is not there.
        ShardingError: it is to be sharded.
    """
    own: Mapping[str, object] | None = getattr(config, "quantization_config", None)
    if not given and own is None:
        return {}
    if given and own is not None:
        raise ValueError("quantisation: the folder's weights are quantised already, as its config.json says; leave it out")
    if sharding is not None and sharding.kind not in ("none", "auto"):
        raise ShardingError(
            f"sharding: {sharding.kind} splits weights as floats, and this teacher's are quantised; expected kind: none, or a folder with "
            "float weights and no quantisation"
        )
    if (said := given or own or {}).get("load_in_8bit") and said.get("llm_int8_threshold", 6.0):
        logging.getLogger(__name__).warning(
            "bitsandbytes' int8 keeps columns in 16 bits in which any token of a batch is large, so that a row's answers depend on the "
            "rows beside it and on padding: stored features are not those of the teacher at work. llm_int8_threshold: 0.0, in the "
            "recipe's quantisation or in the folder's config.json, makes them a row's own"
        )
    there = {"device_map": {"": device or torch.device("cpu")}}  # some methods cannot be moved once they are loaded
    if not given:
        return there
    try:
        made = AutoQuantizationConfig.from_dict(dict(given))
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ValueError(f"quantisation: transformers cannot read it: {error}") from None
    return {**there, "quantization_config": made}


def is_quantised(model: PreTrainedModel) -> bool:
    """Whether transformers has quantised ``model``."""
    return getattr(model, "hf_quantizer", None) is not None


def float_weight(module: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """[out, in] the weight of a quantised linear layer, as it runs in ``dtype``; None for modules with a plain tensor of floats."""
    weight = getattr(module, "weight", None)
    width = getattr(module, "in_features", None)
    if not isinstance(weight, Tensor) or width is None or (type(weight) in (Tensor, nn.Parameter) and weight.itemsize > 1):
        return None
    bias = getattr(module, "bias", None)
    with torch.no_grad():
        found: Tensor = module(torch.eye(width, dtype=dtype, device=weight.device))
        return (found if bias is None else found - bias).T.contiguous()
