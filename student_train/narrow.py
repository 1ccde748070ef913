"""Weights of a narrower student, cut out of those of a wider model of the same family (a "truncated" student).

Which axis of a weight means what is known of the attention by its place in the family (online.families); any other axis is told by
its sizes in both models. What neither explains is refused by name. Heads stay whole, and a key head goes with its query heads. Where
the width of heads shrinks with the model (only in models with learned positions), each head keeps its first elements; scores are
then scaled by another root than the teacher's. Numbers beside the weights follow from the student's configuration: Gemma's
embeddings are multiplied by the root of the student's width, not of the teacher's, and norms average over the channels that are left.

Shapes: L blocks of the student, D hidden channels, H query heads in G groups with a key head each, R = H / G, C width of one head,
U feed-forward units.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from online.families import FAMILIES
from online.models import model_shape
from student_train.blocks import block_pattern

UNITS = ("intermediate_size", "n_inner", "hidden_dim")
"""What configurations call the number of feed-forward units."""

WIDTHS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", *UNITS)
"""Options of configurations that may shrink, by their common names."""

_GATED = {"modernbert": "mlp.Wi"}
"""Layer of a block whose outputs are twice the feed-forward units: one half of them gates the other."""

Role = Literal["all", "channels", "query", "key", "fused", "units", "gated units"]
"""What of an axis stays: all of it, hidden channels, elements of query or of key heads, queries, keys and values one after the other,
feed-forward units, or those of two halves."""


@dataclass(frozen=True)
class Sizes:
    """The widths of a model."""

    channels: int
    heads: int
    groups: int
    head_width: int
    units: int

    def __str__(self) -> str:
        return f"{self.channels} channels, {self.heads} heads of {self.head_width}, {self.units} feed-forward units"

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Self:
        shape = model_shape(config, "base")
        if shape.width_of("input") != shape.width:
            raise ValueError(f"student.width: {config.model_type} has bottlenecks; what is cut out of it does not fit together")
        if not getattr(config, "head_dim", None) and shape.width % shape.heads:
            raise ValueError(f"student.width: hidden_size {shape.width} is no multiple of num_attention_heads {shape.heads}")
        units = next((count for name in UNITS if (count := getattr(config, name, None))), 4 * shape.width)  # GPT-2's default
        return cls(shape.width, shape.heads, shape.kv_heads, shape.head_width, units)


@dataclass(frozen=True)
class Scores:
    """How much matters what a narrower student may keep, float64; None where all of it, or the first of it, stays."""

    channels: Tensor | None = None
    """[D]."""
    heads: Tensor | None = None
    """[L, H] for each block of the student."""
    units: Tensor | None = None
    """[L, U]."""


@dataclass(frozen=True)
class Kept:
    """Numbers of what stays, ascending; the same channels everywhere, heads and units for each block of the student."""

    channels: Tensor
    query: tuple[Tensor, ...]
    """Elements of the query heads, of H * C."""
    key: tuple[Tensor, ...]
    """Elements of the key heads, of G * C."""
    units: tuple[Tensor, ...]


def check_sizes(wide: PreTrainedConfig, narrow: PreTrainedConfig, important: bool) -> None:
    """Refuse widths that cannot be cut out of ``wide``; ``important``: what stays is chosen by scores.

    Raises:
        ValueError: something grows, heads would have to be cut or regrouped, or channels cannot be told from units.
    """
    before, after = Sizes.of(wide), Sizes.of(narrow)
    names = {"channels": "hidden_size", "heads": "num_attention_heads", "groups": "num_key_value_heads", "units": UNITS[0]}
    for field, name in {**names, "head_width": "the width of a head"}.items():
        if getattr(after, field) > getattr(before, field):
            advice = " (give fewer num_attention_heads)" if field == "head_width" else ""
            raise ValueError(f"student.width: {name} can only shrink, found {getattr(before, field)} -> {getattr(after, field)}{advice}")
    if after.heads % after.groups or after.heads // after.groups > before.heads // before.groups:
        raise ValueError(
            f"student.width: the source's key heads serve {before.heads // before.groups} query heads each, so {after.heads} "
            f"num_attention_heads cannot share {after.groups} num_key_value_heads: give both"
        )
    if after.head_width != before.head_width and (important or FAMILIES[wide.model_type].rotary is not None):
        why = "importance keeps or drops whole heads" if important else "rotary embeddings turn fixed pairs of their elements"
        raise ValueError(
            f"student.width: heads would shrink from {before.head_width} to {after.head_width} elements, but {why}: give "
            f"num_attention_heads so that hidden_size / num_attention_heads stays {before.head_width}"
        )
    if important and (before.channels, after.channels) == (before.units, after.units):
        raise ValueError("student.width: hidden_size and feed-forward units are the same numbers, so that weights do not tell them apart")


def roles(wide: PreTrainedModel, narrow: PreTrainedModel) -> dict[str, tuple[Role, ...]]:
    """Name of each weight -> what stays of its axes; either model may be on the meta device.

    Raises:
        ValueError: an axis that becomes shorter, and no rule says which part of it stays.
    """
    before, after = Sizes.of(wide.config), Sizes.of(narrow.config)
    sizes = {name: weight.shape for name, weight in narrow.state_dict().items()}
    found: dict[str, tuple[Role, ...]] = {}
    for name, weight in wide.state_dict().items():
        heads = _head_axis(wide, name)
        axes: list[Role] = []
        for axis, (long, short) in enumerate(zip(weight.shape, sizes[name], strict=True)):
            role = heads[1] if heads and heads[0] == axis else "all" if long == short else _by_size(wide, name, before, after, long, short)
            if long != _length(role, before, long) or short != _length(role, after, short):
                raise _unknown(name, long, short)
            axes.append(role)
        found[name] = tuple(axes)
    return found


def kept(wide: PreTrainedConfig, narrow: PreTrainedConfig, scores: Scores) -> Kept:
    """What ``narrow`` keeps: the first of everything that has no scores, else what has the highest; of equal ones the first."""
    before, after, blocks = Sizes.of(wide), Sizes.of(narrow), range(narrow.num_hidden_layers)
    query, key = zip(*(_heads(None if scores.heads is None else scores.heads[block], before, after) for block in blocks), strict=True)
    units = (_best(None if scores.units is None else scores.units[block], after.units, before.units) for block in blocks)
    return Kept(_best(scores.channels, after.channels, before.channels), query, key, tuple(units))


def cut(wide: PreTrainedModel, axes: Mapping[str, tuple[Role, ...]], keep: Kept) -> dict[str, Tensor]:
    """The weights of the narrower model; new tensors where anything was cut."""
    number = block_pattern(wide.config.model_type)
    before = Sizes.of(wide.config)
    weights: dict[str, Tensor] = {}
    for name, weight in wide.state_dict().items():
        match = number.search(name)
        for axis, role in enumerate(axes[name]):
            if role != "all":
                weight = weight.index_select(axis, _numbers(role, 0 if match is None else int(match[1]), keep, before))
        weights[name] = weight
    return weights


def _head_axis(model: PreTrainedModel, name: str) -> tuple[int, Role] | None:
    """The axis of a weight of the attention that runs over elements of heads."""
    family = FAMILIES[model.config.model_type]
    match = block_pattern(model.config.model_type).search(name)
    path, _, part = name[match.end() if match else len(name) :].rpartition(".")
    if path not in (*family.projections, family.attention_output):
        return None
    last = isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) and part == "weight"  # kept as [in, out]
    if path == family.attention_output:
        return None if part == "bias" else (0 if last else 1, "query")
    role: Role = "fused" if len(family.projections) == 1 else "query" if path == family.projections[0] else "key"
    return (1 if last else 0), role


def _by_size(wide: PreTrainedModel, name: str, before: Sizes, after: Sizes, long: int, short: int) -> Role:
    match = block_pattern(wide.config.model_type).search(name)
    gated = match is not None and name[match.end() :].rpartition(".")[0] == _GATED.get(wide.config.model_type)
    if (long, short) == (before.channels, after.channels):
        return "channels"
    if match is not None and gated and (long, short) == (2 * before.units, 2 * after.units):
        return "gated units"
    if match is not None and not gated and (long, short) == (before.units, after.units):
        return "units"
    raise _unknown(name, long, short)


def _unknown(name: str, long: int, short: int) -> ValueError:
    return ValueError(f"student.width: {name} would have {short} instead of {long} along an axis, and no rule says which of them to keep")


def _length(role: Role, sizes: Sizes, otherwise: int) -> int:
    """How long an axis of ``role`` is."""
    lengths: dict[Role, int] = {
        "channels": sizes.channels,
        "query": sizes.heads * sizes.head_width,
        "key": sizes.groups * sizes.head_width,
        "fused": (sizes.heads + 2 * sizes.groups) * sizes.head_width,
        "units": sizes.units,
        "gated units": 2 * sizes.units,
    }
    return lengths.get(role, otherwise)


def _numbers(role: Role, block: int, keep: Kept, before: Sizes) -> Tensor:
    query, key, units = keep.query[block], keep.key[block], keep.units[block]
    if role == "fused":
        first_key = before.heads * before.head_width
        return torch.cat([query, first_key + key, first_key + before.groups * before.head_width + key])
    if role == "gated units":
        return torch.cat([units, before.units + units])
    return {"channels": keep.channels, "query": query, "key": key, "units": units}[role]


def _heads(scores_H: Tensor | None, before: Sizes, after: Sizes) -> tuple[Tensor, Tensor]:
    """Elements of the query and of the key heads that stay: the groups whose best heads matter most, and those heads of them."""
    served, stay = before.heads // before.groups, after.heads // after.groups
    scores_GR = None if scores_H is None else scores_H.view(before.groups, served)
    groups = _best(None if scores_GR is None else scores_GR.topk(stay).values.sum(1), after.groups, before.groups)
    heads = torch.cat([group * served + _best(None if scores_GR is None else scores_GR[group], stay, served) for group in groups.tolist()])

    def elements(numbers: Tensor) -> Tensor:
        return (numbers[:, None] * before.head_width + torch.arange(after.head_width)).flatten()

    return elements(heads), elements(groups)


def _best(scores: Tensor | None, count: int, available: int) -> Tensor:
    """Numbers of the ``count`` highest scores, ascending."""
    if scores is None or count == available:
        return torch.arange(count)
    assert len(scores) == available
    return scores.argsort(descending=True, stable=True)[:count].sort().values
