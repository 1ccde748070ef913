"""Derive one feature from others: one code for the dump, the stored and the live teacher, and ``Capture``'s attention.

All of it runs in float32, also under autocast: derived attention is exact only there.

Shapes: B rows, T tokens, H query heads, G key heads, C width of one head, Q = H * C, K = G * C, P rotary frequencies.
Other values are [..., width], the leading shape any of those in online.batch.Value.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from online.batch import Batch, Features, Value, dense, narrowed, take, words_at
from online.encode import packed_in_form, padded_value
from online.masks import pair_mask, token_positions
from online.words import Product, Words
from store.features import FeatureKey
from store.shape import ModelShape, Wiring

PAIRWISE = frozenset({"attention_scores", "attention_probs"})
"""Sites with a value for each pair of tokens: quadratic in length, so derived from all tokens and never stored."""

Statics = Mapping[str, Tensor]
"""Weights by their names in store.shape.STATICS, float32."""


# Attention


def attention_scores(
    query_BTQ: Tensor, key_BTK: Tensor, statics: Statics, layer: int, batch: Batch, shape: ModelShape, wiring: Wiring
) -> Tensor:
    """Scaled scores of block ``layer`` from its projections, [B, H, T, T] float32.

    Head norm, rotary embedding, scale and soft cap are applied as the model does; pairs that ``pair_mask`` rules out
    hold the lowest finite float32.

    Source: Vaswani et al. 2017, equation 1; RoFormer (Su et al. 2021), equation 34; soft cap: Gemma 2 report, section 2.
    """
    with torch.autocast(query_BTQ.device.type, enabled=False):
        query_BHTC = _heads(query_BTQ, shape.heads, statics.get(f"{layer}.query_norm.weight"), wiring)
        key_BGTC = _heads(key_BTK, shape.kv_heads, statics.get(f"{layer}.key_norm.weight"), wiring)
        if wiring.rotary:
            angles_BTC = _angles(statics[f"{layer}.rotary"], batch)
            query_BHTC = _rotate(query_BHTC, angles_BTC, wiring.rotary_scaling)
            key_BGTC = _rotate(key_BGTC, angles_BTC, wiring.rotary_scaling)
        key_BHTC = key_BGTC.repeat_interleave(shape.heads // shape.kv_heads, dim=1)
        scores_BHTT = query_BHTC @ key_BHTC.transpose(2, 3) * wiring.attention_scale[layer - 1]
        scores_BHTT = _capped(scores_BHTT, wiring.score_cap)
        return scores_BHTT.masked_fill(~pair_mask(batch, shape, layer), torch.finfo(torch.float32).min)


def attention_probs(scores_BHTT: Tensor) -> Tensor:
    """Attention probabilities before dropout, [B, H, T, T] float32; what padding attends to means nothing."""
    return scores_BHTT.float().softmax(-1)


def _heads(projected_BTE: Tensor, heads: int, norm_C: Tensor | None, wiring: Wiring) -> Tensor:
    """Split [B, T, heads * C] into [B, heads, T, C] and norm each head where the model does."""
    split_BTHC = projected_BTE.float().unflatten(-1, (heads, -1))
    if wiring.head_norm is not None:
        split_BTHC = normed(split_BTHC, wiring.head_norm, norm_C, None, wiring.norm_eps)
    return split_BTHC.transpose(1, 2)


def _angles(frequencies_P: Tensor, batch: Batch) -> Tensor:
    """Angle by which each element of a head is turned, [B, T, 2P]: the P frequencies twice over."""
    angles_BTP = token_positions(batch)[..., None].float() * frequencies_P.float()
    return torch.cat([angles_BTP, angles_BTP], dim=-1)


def _rotate(heads_BHTC: Tensor, angles_BTC: Tensor, scaling: float) -> Tensor:
    """Turn the leading 2P elements of each head; element j pairs with j + P, as in Hugging Face's models."""
    turned, rest = heads_BHTC.tensor_split([angles_BTC.shape[-1]], dim=-1)
    low, high = turned.chunk(2, dim=-1)
    cos_B1TC, sin_B1TC = (angles_BTC.cos() * scaling)[:, None], (angles_BTC.sin() * scaling)[:, None]
    return torch.cat([turned * cos_B1TC + torch.cat([-high, low], dim=-1) * sin_B1TC, rest], dim=-1)


def _capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else torch.tanh(x / cap) * cap


def normed(x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Norm over the last dimension: ``layer``, ``rms``, ``rms_one`` that multiplies by 1 + weight, or ``affine`` without statistics."""
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    assert weight is not None
    if kind == "affine":
        assert bias is not None
        return x * weight + bias
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1 + weight if kind == "rms_one" else weight)


# One feature from others


@dataclass(frozen=True)
class Context:
    """What a derivation knows beside the values of its sources."""

    batch: Batch
    statics: Statics
    shape: ModelShape
    wiring: Wiring

    def linear(self, x: Tensor, name: str) -> Tensor:
        """``x`` times the static ``name``."""
        return F.linear(x, self.statics[f"{name}.weight"], self.statics.get(f"{name}.bias"))


Compute = Callable[[FeatureKey, Sequence[Any], Context], Value]
"""A key from the values of its sources: tensors, and where the key has a form of word predictions whatever word logits are."""


def _same(key: FeatureKey, sources: Sequence[Tensor], context: Context) -> Tensor:
    return sources[0]


def _taken(key: FeatureKey, sources: Sequence[Tensor], context: Context) -> Tensor:
    return take(sources[0], context.batch, key.positions)


def _in_form(key: FeatureKey, sources: Sequence[Value], context: Context) -> Value:
    return padded_value(key, packed_in_form(key, sources[0], context.batch), context.batch)


def _narrowed(key: FeatureKey, sources: Sequence[Tensor], context: Context) -> Tensor:
    return narrowed(sources[0], key.kept)


def _normed(key: FeatureKey, sources: Sequence[Tensor], context: Context) -> Tensor:
    name = "final_norm" if key.layer is None else f"{key.layer}.norm"
    if not has_static(f"{name}.weight", context.shape, context.wiring):
        return sources[0]
    assert context.wiring.norm is not None
    weight, bias = context.statics[f"{name}.weight"], context.statics.get(f"{name}.bias")
    return normed(sources[0], context.wiring.norm, weight, bias, context.wiring.norm_eps)


def _squeezed(key: FeatureKey, sources: Sequence[Tensor], context: Context) -> Tensor:
    """A hidden state behind a bottleneck: linear layer, norm."""
    wiring, name = context.wiring, f"{key.layer}.bottleneck"
    assert wiring.bottleneck_norm is not None
    weight, bias = context.statics[f"{name}_norm.weight"], context.statics.get(f"{name}_norm.bias")
    return normed(context.linear(sources[0], name), wiring.bottleneck_norm, weight, bias, wiring.bottleneck_norm_eps)


def _projected(key: FeatureKey, sources: Sequence[Tensor], context: Context) -> Tensor:
    return context.linear(sources[0], f"{key.layer}.{key.site}")


def _scores(key: FeatureKey, sources: Sequence[Tensor], context: Context) -> Tensor:
    assert key.layer is not None
    query_BTQ, key_BTK = sources
    return attention_scores(query_BTQ, key_BTK, context.statics, key.layer, context.batch, context.shape, context.wiring)


def _probs(key: FeatureKey, sources: Sequence[Tensor], context: Context) -> Tensor:
    return attention_probs(sources[0])


def _transformed(key: FeatureKey, sources: Sequence[Tensor], context: Context) -> Tensor:
    """Transform of a masked-LM head: dense, activation, layer norm."""
    if context.wiring.head_activation is None:
        return sources[0]
    active = ACT2FN[context.wiring.head_activation](context.linear(sources[0], "transform"))
    weight, bias = context.statics["transform_norm.weight"], context.statics.get("transform_norm.bias")
    return normed(active, "layer", weight, bias, context.wiring.head_norm_eps)


def _words(key: FeatureKey, sources: Sequence[Tensor], context: Context) -> Words:
    head = Product(context.statics["head.weight"], context.statics.get("head.bias"), context.wiring.logit_cap)
    return words_at(key, sources[0], context.batch, head, context.shape.vocab)


# The table


@dataclass(frozen=True)
class Derivation:
    """One way to get a site, token by token. Names hold {i}, the key's block, {before} and {after} it, and {last}."""

    sources: tuple[str, ...]
    statics: tuple[str, ...]
    """Weights it uses, of those that the model has; where it has none of them, the site is its source under another name."""
    compute: Compute
    holds: Callable[[int, ModelShape, Wiring], bool] = lambda i, shape, wiring: True
    """Whether it is true of block i (0 for sites without layers)."""


DERIVATIONS: dict[str, tuple[Derivation, ...]] = {
    "hidden": (
        Derivation(
            ("input.{after}",),
            (),
            _same,
            lambda i, shape, wiring: i < shape.layers and not shape.bottleneck and not has_norm(i + 1, shape, wiring),
        ),
        Derivation(("final",), (), _same, lambda i, shape, wiring: i == shape.layers and wiring.norm is None),
    ),
    "input": (
        Derivation(("hidden.{before}",), ("{i}.norm.weight",), _normed, lambda i, shape, wiring: not shape.bottleneck),
        Derivation(
            ("hidden.{before}",),
            ("{i}.bottleneck.weight", "{i}.bottleneck_norm.weight"),
            _squeezed,
            lambda i, shape, wiring: shape.bottleneck > 0,
        ),
    ),
    "query": (Derivation(("input.{i}",), ("{i}.query.weight",), _projected),),
    "key": (Derivation(("input.{i}",), ("{i}.key.weight",), _projected),),
    "value": (
        Derivation(("input.{i}",), ("{i}.value.weight",), _projected, lambda i, shape, wiring: not _past_bottleneck(shape, wiring)),
        Derivation(("hidden.{before}",), ("{i}.value.weight",), _projected, lambda i, shape, wiring: _past_bottleneck(shape, wiring)),
    ),
    "attention_scores": (
        Derivation(
            ("query.{i}", "key.{i}"),
            ("{i}.query_norm.weight", "{i}.key_norm.weight", "{i}.rotary"),
            _scores,
            lambda i, shape, wiring: not wiring.rotary_by_length,
        ),
    ),
    "attention_probs": (Derivation(("attention_scores.{i}",), (), _probs),),
    "final": (
        Derivation(("hidden.{last}",), ("final_norm.weight",), _normed),
        Derivation(("head_input",), (), _same, lambda i, shape, wiring: wiring.head_activation is None),
    ),
    "head_input": (Derivation(("final",), ("transform.weight", "transform_norm.weight"), _transformed),),
    "lm_logits": (Derivation(("head_input",), ("head.weight",), _words),),
}


def _past_bottleneck(shape: ModelShape, wiring: Wiring) -> bool:
    """Whether values are projected from hidden states while queries and keys are from a bottleneck behind these."""
    return shape.bottleneck > 0 and not wiring.bottleneck_values


def has_norm(block: int, shape: ModelShape, wiring: Wiring) -> bool:
    """Whether a norm stands in front of the projections of ``block``, counted from 1."""
    return shape.pre_norm and (wiring.first_norm or block > 1)


def has_static(name: str, shape: ModelShape, wiring: Wiring) -> bool:
    """Whether the model has the weight ``name``."""
    block, _, part = name.removesuffix(".weight").rpartition(".")
    optional = {
        "norm": bool(block) and has_norm(int(block), shape, wiring),
        "bottleneck": wiring.bottleneck_norm is not None,
        "bottleneck_norm": wiring.bottleneck_norm is not None,
        "query_norm": wiring.head_norm is not None,
        "key_norm": wiring.head_norm is not None,
        "rotary": wiring.rotary,
        "final_norm": wiring.norm is not None,
        "transform": wiring.head_activation is not None,
        "transform_norm": wiring.head_activation is not None,
    }
    return optional.get(part, True)


@dataclass(frozen=True)
class Step:
    """One way to get one key."""

    sources: tuple[FeatureKey, ...]
    statics: tuple[str, ...]
    """Weights it cannot do without; their biases come along where the model has them."""
    compute: Compute


def steps(key: FeatureKey, shape: ModelShape, wiring: Wiring) -> list[Step]:
    """Every way to get ``key`` in one step, those that compute the fewest tokens first."""
    if key.words:
        return [] if key.form == "select" else [Step((replace(key, form=""),), (), _in_form)]
    if key.kept:
        whole = [Step((replace(key, form=""),), (), _narrowed)]
        return whole if key.positions == "all" else [*whole, Step((key.at("all"),), (), _taken)]
    if key.site in PAIRWISE and key.positions != "all":
        return []
    found = []
    block = key.layer or 0
    names = {"i": block, "before": block - 1, "after": block + 1, "last": shape.layers}
    for way in DERIVATIONS.get(key.site, ()) if shape.attends else ():
        statics = tuple(name for static in way.statics if has_static(name := static.format(**names), shape, wiring))
        of_each_token = key.positions != "mean" or not statics  # the norm of a mean is not the mean of norms
        if of_each_token and way.holds(block, shape, wiring):
            sources = tuple(FeatureKey.parse(source.format(**names)).at(key.positions) for source in way.sources)
            found.append(Step(sources, statics, way.compute))
    if key.positions in ("labels", "masked"):  # two words for the tokens that carry a label
        found.append(Step((key.at("masked" if key.positions == "labels" else "labels"),), (), _same))
    if key.positions not in ("all", "row"):
        found.append(Step((key.at("all"),), (), _taken))
    return found


def route(
    key: FeatureKey,
    have: Collection[FeatureKey],
    statics: Collection[str] | None,
    shape: ModelShape,
    wiring: Wiring,
    path: frozenset[FeatureKey] = frozenset(),
) -> list[tuple[FeatureKey, Step]] | None:
    """Steps that lead from ``have`` to ``key``, in order, or None if none do.

    Args:
        statics: Names of the weights at hand; None for all that the model has.
        path: Keys that are waiting for this one.
    """
    if key in have:
        return []
    for step in steps(key, shape, wiring):
        if path.isdisjoint(step.sources) and (statics is None or all(name in statics for name in step.statics)):
            parts = [route(source, have, statics, shape, wiring, path | {key}) for source in step.sources]
            if None not in parts:
                return [*(earlier for part in parts if part for earlier in part), (key, step)]
    return None


def derive(wanted: Iterable[FeatureKey], have: Features, statics: Statics, batch: Batch, shape: ModelShape, wiring: Wiring) -> Features:
    """Values of ``wanted`` (no pass names) from those in ``have`` and the weights, float32.

    Raises:
        ValueError: a key does not follow from ``have``.
    """
    values, context = dict(have), Context(batch, statics, shape, wiring)
    wanted = tuple(wanted)
    with torch.autocast(batch.mask.device.type, enabled=False):
        for key in wanted:
            way = route(key, have, statics, shape, wiring)
            if way is None:
                raise ValueError(f"{key} does not follow from {', '.join(map(str, have)) or 'nothing'} and the weights at hand")
            for made, step in way:
                if made not in values:
                    values[made] = step.compute(made, [values[one] if made.words else dense(values, one) for one in step.sources], context)
    return {key: values[key] for key in wanted}
