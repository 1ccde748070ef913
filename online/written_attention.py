"""Attention of a block in single steps, so that its scores and probabilities can be written.

transformers asks the configuration that an attention module holds how attention is to be computed. Here that module, and no other,
holds a copy that names the function below, so that all else, masks included, is made as before.

Shapes: B rows, H query heads, G key heads, T tokens, C width of one head.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

Write = Callable[[Tensor], Tensor]
"""What is to stand in the place of a tensor: same shape, same dtype."""

ATTENTION = ("attention_scores", "attention_probs")
_NAME = "teachercache_written"
_WRITES: WeakKeyDictionary[nn.Module, list[Mapping[str, Write]]] = WeakKeyDictionary()


@contextmanager
def attention_written(module: nn.Module, writes: Mapping[str, Write]) -> Iterator[None]:
    """Inside, the attention module ``module`` runs with ``writes`` (keys: those of ATTENTION), after those of contexts around it."""
    AttentionInterface.register(_NAME, _attend)
    before, held = _WRITES.get(module, []), module.config
    _WRITES[module] = [*before, writes]
    changed = copy.copy(held)
    changed._attn_implementation = _NAME  # type: ignore[union-attr]
    module.config = changed
    try:
        yield
    finally:
        module.config = held
        _WRITES[module] = before


def _attend(
    module: nn.Module,
    query_BHTC: Tensor,
    key_BGTC: Tensor,
    value_BGTC: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **_unused: object,
) -> tuple[Tensor, Tensor]:
    """As transformers' eager attention, to the bit in float32; returns [B, T, H, C] and the probabilities [B, H, T, T]."""
    groups = query_BHTC.shape[1] // key_BGTC.shape[1]
    key_BHTC, value_BHTC = key_BGTC.repeat_interleave(groups, dim=1), value_BGTC.repeat_interleave(groups, dim=1)
    scores_BHTT = query_BHTC @ key_BHTC.transpose(2, 3) * (query_BHTC.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores_BHTT = torch.tanh(scores_BHTT / softcap) * softcap
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if (allowed_BHTT := _allowed(attention_mask, scores_BHTT, causal)) is not None:
        scores_BHTT = scores_BHTT.masked_fill(~allowed_BHTT, torch.finfo(scores_BHTT.dtype).min)
    scores_BHTT = _written(module, "attention_scores", scores_BHTT)
    probs_BHTT = scores_BHTT.softmax(-1, dtype=torch.promote_types(scores_BHTT.dtype, torch.float32)).to(value_BHTC.dtype)
    probs_BHTT = _written(module, "attention_probs", probs_BHTT)
    mixed_BHTC = F.dropout(probs_BHTT, dropout, module.training) @ value_BHTC
    return mixed_BHTC.transpose(1, 2).contiguous(), probs_BHTT


def _allowed(mask: Tensor | None, scores_BHTT: Tensor, causal: bool) -> Tensor | None:
    """Which pairs attend, bool, of a mask made for eager attention (0 or the lowest number), for SDPA (bool), or left out by SDPA."""
    if mask is None:
        return torch.ones_like(scores_BHTT[0, 0], dtype=torch.bool).tril() if causal else None
    if mask.dim() != 4:
        raise ValueError("attention is written in eager attention and SDPA alone; load the model with one of these")
    return mask if mask.dtype == torch.bool else mask == 0


def _written(module: nn.Module, site: str, value_BHTT: Tensor) -> Tensor:
    for writes in _WRITES.get(module, []):
        if site in writes:
            value_BHTT = writes[site](value_BHTT)
    return value_BHTT
