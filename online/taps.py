"""Where in a model the tensor of a site is met: a module, and what of its input or output.

Shapes: B rows, T padded tokens, W width of a feature, V words, C outputs of the task head.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from online.families import submodule
from online.models import LoadedModel

Site = tuple[str, int]
"""Site and layer of a tensor that a hook reads or writes; 0 where a site has no layers."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a call."""

PROJECTIONS = ("query", "key", "value")


@dataclass(frozen=True)
class Tap:
    """A module that takes a site's tensor in, as its first argument, or gives it out."""

    module: nn.Module
    takes_in: bool = False
    third: int | None = None
    """Which third of the module's output, where one module computes query, key and value."""

    def read(self, value: object) -> Tensor:
        """The tensor in ``value``: itself, the hidden states of a block that gives out a tuple, or the logits of a model."""
        whole = value.logits if isinstance(value, ModelOutput) else value[0] if isinstance(value, tuple) else value
        assert isinstance(whole, Tensor), type(whole)
        return whole if self.third is None else whole.chunk(3, dim=-1)[self.third]

    def written(self, value: object, new: Tensor) -> object:
        """``value`` with ``new`` where ``read`` finds the tensor; no tensor is changed."""
        if self.third is not None:
            assert isinstance(value, Tensor)
            return torch.cat([new if i == self.third else part for i, part in enumerate(value.chunk(3, dim=-1))], dim=-1)
        if isinstance(value, ModelOutput):
            return type(value)(**{**value, "logits": new})
        return (new, *value[1:]) if isinstance(value, tuple) else new


def tap(loaded: LoadedModel, site: Site) -> Tap:
    """Where ``loaded`` meets the tensor of ``site``; attention scores and probabilities have no such place."""
    name, layer = site
    family = loaded.family
    if name == "input":
        return Tap(attention_module(loaded, layer), takes_in=True)
    if name in PROJECTIONS:
        fused, index = len(family.projections) == 1, PROJECTIONS.index(name)
        module = submodule(loaded.block(layer), family.projections[0 if fused else index])
        return Tap(module, third=index if fused else None)
    if name == "hidden" and layer == 0:
        return Tap(loaded.block(1), takes_in=True)
    if name == "hidden" or (name == "final" and family.final_norm is None):
        return Tap(loaded.block(layer or loaded.shape.layers))
    if name == "final":
        assert family.final_norm is not None
        return Tap(submodule(loaded.body, family.final_norm))
    if name == "head_input":
        return before_words(loaded)
    assert name in ("task_logits", "lm_logits"), name
    score = getattr(loaded.model, "score", None)
    if loaded.shape.head == "classification" and loaded.shape.causal and isinstance(score, nn.Module):
        # decoders score every token; transformers finds the last one by its id, which may also end a row's text
        return Tap(score)
    return Tap(loaded.model)


def before_words(loaded: LoadedModel) -> Tap:
    """Where the language-model head's input is met while the model runs."""
    family, head = loaded.family, loaded.word_head
    if family.head_rest is not None and family.transform is not None:  # narrow_head: what stands for the head is no part of the model
        return Tap(submodule(loaded.model, family.transform[1]))
    assert head is not None
    return Tap(head, takes_in=True)


def attention_module(loaded: LoadedModel, layer: int) -> nn.Module:
    """The module of block ``layer`` that holds the projections and calls transformers' attention function.

    Its first argument is what the query projection reads, and the key projection too; the value projection's is the same tensor
    wherever it reads that as well (online.bottleneck).
    """
    return submodule(loaded.block(layer), loaded.family.projections[0].rpartition(".")[0])


def computes_anew(model: nn.Module) -> bool:
    """Whether a backward pass runs blocks a second time, when contexts around the first are over: gradient checkpointing in training."""
    return (
        torch.is_grad_enabled() and model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    )


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a call hands over first."""
    first = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(first, Tensor), type(first)
    return first


def with_first(args: tuple[Any, ...], kwargs: dict[str, Any], new: Tensor) -> Arguments:
    """The same arguments with ``new`` in every place where the first one stands."""
    first = first_argument(args, kwargs)
    return tuple(_swapped(args, first, new)), dict(zip(kwargs, _swapped(kwargs.values(), first, new), strict=True))


def _swapped(values: Iterable[Any], old: Tensor, new: Tensor) -> list[Any]:
    return [new if value is old else value for value in values]
