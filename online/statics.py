"""Weights that turn one feature into another, read from a live model under the names of store.shape.STATICS."""

import re
from collections.abc import Iterable

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from online.families import submodule
from online.models import LoadedModel
from online.quantised import Quantised, float_weight

_NAME = re.compile(
    r"(?P<layer>[1-9]\d*)\.(?:(?P<projection>query|key|value)\.(?P<part>weight|bias)"
    r"|(?P<front>norm|bottleneck|bottleneck_norm)\.(?P<of_front>weight|bias)"
    r"|(?P<head_norm>query|key)_norm\.weight|(?P<rotary>rotary))|(?P<model>final_norm|transform|transform_norm|head)\.(?P<of_model>weight|bias)"
)
_PROJECTIONS = ("query", "key", "value")


def live_statics(loaded: LoadedModel, names: Iterable[str]) -> dict[str, Tensor]:
    """The weights ``names`` of the model as it runs, one module at a time; names that the model lacks are left out.

    The tensors are the live parameters (of fused projections views, [out, in] also where the model keeps [in, out]),
    so gradients reach them; of a sharded model they are copies, gathered by all of its ranks.

    Raises:
        ValueError: no such name, or a block out of range.
    """
    found = {name: _static(loaded, name) for name in names}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _static(loaded: LoadedModel, name: str) -> Tensor | None:
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"unknown weight {name!r}; names are as in store.shape.STATICS, such as 1.query.weight")
    family, shape = loaded.family, loaded.shape
    if not shape.attends and match["model"] != "head":
        return None
    if match["model"]:
        return _parameter(loaded, _of_model(loaded, match["model"]), match["of_model"])
    layer = int(match["layer"])
    if layer > shape.layers:
        raise ValueError(f"{name}: the model has blocks 1 to {shape.layers}")
    block = loaded.block(layer)
    if match["projection"]:
        return _projection(loaded, block, match["projection"], match["part"])
    if match["front"]:
        path = _front(loaded, match["front"])
        return None if path is None else _parameter(loaded, submodule(block, path), match["of_front"])
    if match["head_norm"]:
        path = None if family.head_norms is None else family.head_norms[_PROJECTIONS.index(match["head_norm"])]
        return None if path is None else _parameter(loaded, submodule(block, path), "weight")
    return _rotary(loaded, layer)


def _front(loaded: LoadedModel, name: str) -> str | None:
    """Where a block keeps the module ``name`` that stands in front of its projections; None where it has none."""
    if name == "norm":
        return loaded.family.norm
    bottleneck = loaded.family.bottleneck(loaded.model.config)
    return None if bottleneck is None else f"{bottleneck.path}.{'dense' if name == 'bottleneck' else 'LayerNorm'}"


def _of_model(loaded: LoadedModel, name: str) -> nn.Module | None:
    family = loaded.family
    if name == "head":
        return loaded.word_head
    if name == "final_norm":
        return None if family.final_norm is None else submodule(loaded.body, family.final_norm)
    if family.transform is None or loaded.shape.head != "masked_lm":
        return None
    return submodule(loaded.model, family.transform[0 if name == "transform" else 1])


def _projection(loaded: LoadedModel, block: nn.Module, which: str, part: str) -> Tensor | None:
    paths = loaded.family.projections
    index = _PROJECTIONS.index(which)
    module = submodule(block, paths[index] if len(paths) == 3 else paths[0])
    tensor = _parameter(loaded, module, part)
    if tensor is None:
        return None
    if isinstance(module, Conv1D) and part == "weight":
        tensor = tensor.T
    return tensor if len(paths) == 3 else tensor.chunk(3)[index]


def _rotary(loaded: LoadedModel, layer: int) -> Tensor | None:
    if loaded.family.rotary is None:
        return None
    rotary = submodule(loaded.body, loaded.family.rotary)
    if hasattr(rotary, "inv_freq"):
        return _parameter(loaded, rotary, "inv_freq")
    return _parameter(loaded, rotary, f"{loaded.model.config.layer_types[layer - 1]}_inv_freq")


def _parameter(loaded: LoadedModel, module: nn.Module | None, name: str) -> Tensor | None:
    if module is not None and name == "weight" and isinstance(loaded.weights, Quantised):
        made = float_weight(module, loaded.model.get_input_embeddings().weight.dtype)
        if made is not None:
            return made
    tensor = getattr(module, name, None)
    assert tensor is None or isinstance(tensor, Tensor)
    return None if tensor is None else loaded.weights.whole(tensor)
