"""A batch of rows as tensors, and the values that features take in it.

Shapes: B rows, T padded tokens, N labelled tokens of the batch in row-major order, W width, K kept words.
Rows are padded on the right to a bucket of their own length, so padding is a property of a row; a batch is as long as
its longest bucket.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from online.words import Words
from store.features import FeatureKey, neurons

BUCKET = 16
"""Rows are padded to a multiple of this many tokens."""

IGNORED = -100
"""Token label of a token that is scored against nothing."""


PADDING = 0xFFFF
"""Number of the document that kept padding is (online.padded). Packed documents count from 0: only a row of 65,536 documents of one token
would reach it."""


def bucket(length: int) -> int:
    """Padded length of a row of ``length`` tokens."""
    return -(-length // BUCKET) * BUCKET


@dataclass(frozen=True)
class Batch:
    """Rows of one source, on one device."""

    rows: Tensor
    """[B] int64: number of the row in its store."""
    input_ids: Tensor
    """[B, T] int64; padding holds the tokenizer's pad id."""
    mask: Tensor
    """[B, T] bool: True on tokens that are not padding."""
    segments: Tensor | None
    """[B, T] int64 token types, or None for models and rows without them."""
    documents: Tensor | None
    """[B, T] int64 number of the packed document inside its row (tokens see only their own), None where rows hold one. Padding that rows
    keep is a document of its own that sees the text (online.padded)."""
    position_ids: Tensor | None
    """[B, T] int64, restarting with each packed document; None where rows hold one document."""
    token_labels: Tensor | None
    """[B, T] int64 aligned to the logits that are scored (already shifted for causal rows), IGNORED elsewhere."""
    row_labels: Tensor | None
    """[B] int64 class, or float32 score; for choices 1 on the right row of a group, 0 on the others."""
    groups: Tensor
    """[B] int64: rows of one group carry the same number and stand together."""
    domains: Tensor | None = None
    """[B] int64 place of each row's domain in RowsInfo.domains, None where rows have none."""
    phrases: Tensor | None = None
    """[B, T] int64 number of the phrase that a token belongs to, from 1 on in each row, in the order of the tokens; 0 on padding and tokens
    of none. None where rows have no phrases."""
    interchange: Tensor | None = None
    """[B, T] int64 which token of its partner takes a token's place in an intervention; -1 for none, and on padding. Rows 2k and 2k + 1
    are partners; None where rows have none, or stand in this batch without them."""
    draws: Tensor | None = None
    """[B] int64 random number from 0 on, the same for both of a pair; None where ``interchange`` is."""

    written: Tensor | None = None
    """[B] bool: rows whose labelled words a model has just written (online.rollout), so that they are no truth to learn by; None where
    there are none."""

    verbalisers: Tensor | None = None
    """[C] int64 id of the word that stands for each class, where each row is a cloze with one labelled token; None elsewhere."""

    @property
    def text(self) -> Tensor:
        """[B, T] bool: tokens that are not padding, kept or not."""
        return self.mask if self.documents is None else self.mask & (self.documents != PADDING)

    @property
    def lengths(self) -> Tensor:
        """[B] int64 tokens that are not padding."""
        return self.mask.sum(1)

    @property
    def labelled(self) -> Tensor:
        """[B, T] bool: tokens that carry a label."""
        if self.token_labels is None:
            return torch.zeros_like(self.mask)
        return self.token_labels != IGNORED

    @cached_property
    def real(self) -> Tensor:
        """[U] int64: where the tokens that are not padding stand among all B * T."""
        return self.mask.flatten().nonzero().squeeze(1)

    @cached_property
    def padding(self) -> Tensor:
        """[B * T - U] int64: where the others stand."""
        return self.mask.logical_not().flatten().nonzero().squeeze(1)

    @cached_property
    def scored(self) -> Tensor:
        """[N] int64: where the labelled tokens stand among all B * T."""
        return self.labelled.flatten().nonzero().squeeze(1)

    @cached_property
    def padded_behind(self) -> bool:
        """Whether all padding stands behind the tokens: no row begins with it."""
        return bool(self.mask[:, 0].all())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on ``device``; what has to be counted is counted before, since a GPU that is asked how many is waited for."""
        if device == self.mask.device:
            return self
        tensors: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        present: dict[str, Any] = {name: None if tensor is None else _moved(tensor, device) for name, tensor in tensors.items()}
        moved = Batch(**present)
        vars(moved).update(padded_behind=self.padded_behind)
        vars(moved).update({name: _moved(getattr(self, name), device) for name in ("real", "padding", "scored")})
        return moved


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; to a GPU from pinned memory, the only one from which a copy goes on by itself."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class TopK(NamedTuple):
    """The K likeliest words at each position and what is left for all others (key forms ``topK`` and ``topKpP``), fp32."""

    ids: Tensor
    """[..., K] int64 word ids, likeliest first; 0 in places that are not used."""
    log_probs: Tensor
    """[..., K] log-probabilities at temperature 1 under the whole vocabulary; store.codecs.topk.UNUSED in places that are not used."""
    log_tail: Tensor
    """[...] logarithm of the mass of all other words; the lowest finite float32 where there are none."""


class Drawn(NamedTuple):
    """Words drawn at random from each prediction, D sets of N (key form ``drawN``), fp32."""

    ids: Tensor
    """[..., D * N] int64 word ids, each once in a set; 0 in places that are not used."""
    counts: Tensor
    """[..., D * N] how often each was drawn; 0 in places that are not used."""
    log_weights: Tensor
    """[..., D * N] logarithm of what a draw of it counts, [..., 0] where each counts 1."""


class TopDrawn(NamedTuple):
    """The H likeliest words of each prediction, and D sets of M words drawn from the others (key form ``topHdrawM``), fp32."""

    ids: Tensor
    """[..., H + D * M] int64 word ids: the H likeliest, then each set's by rising id, as often as they were hit."""
    log_probs: Tensor
    """[..., H] log-probabilities of the likeliest."""
    log_tail: Tensor
    """[...] logarithm of the mass of all others, of which each hit of a set stands for an M-th."""


class TopBanded(NamedTuple):
    """The K likeliest words of each prediction, and the mass of the others in B bands of ids (key form ``topKbandB``), fp32."""

    ids: Tensor
    """[..., K] int64 word ids, likeliest first."""
    log_probs: Tensor
    """[..., K] log-probabilities at temperature 1 under the whole vocabulary."""
    bands: Tensor
    """[..., B] codes of the masses (store.codecs.topband), whole numbers from 0 to 255."""


class Selected(NamedTuple):
    """Logits of chosen words and of the true one (key form ``select``), fp32."""

    ids: Tensor
    """[n] int64 chosen word ids."""
    logits: Tensor
    """[..., n] their logits."""
    true_logit: Tensor
    """[...] logit of the position's label; NaN where it has none."""
    log_sum_exp: Tensor
    """[...] over the whole vocabulary."""


Value = Tensor | Words | TopK | Drawn | TopDrawn | TopBanded | Selected
"""What a feature is in a batch. Leading dimensions by positions: ``all`` [B, T, W] with zeros on padding;
``leftL`` [B, L, W] with zeros where a row is shorter; ``first``, ``last``, ``mean``, ``row`` [B, W]; ``masked``, ``labels`` [N, W].
W is M in the form ``widthM``. attention_scores and attention_probs are [B, heads, T, T]."""

Features = dict[FeatureKey, Value]


def dense(features: Features, key: FeatureKey) -> Tensor:
    """The feature ``key`` as a tensor, word logits as a whole; the key must have no form."""
    value = features[key]
    if isinstance(value, Words):
        return value.dense()
    assert isinstance(value, Tensor), key
    return value


def words_at(key: FeatureKey, input_: Tensor, batch: Batch, head: Callable[[Tensor], Tensor], vocab: int) -> Words:
    """Word logits ``key`` from what the ``head`` takes in there: [B, T, W] at ``all``, where padding is left out, else [U, W]."""
    if key.positions != "all":
        return Words(input_, head, vocab)
    return Words(input_.flatten(0, 1).index_select(0, batch.real), head, vocab, batch.real, batch.mask.shape)


def take(value_BTW: Tensor, batch: Batch, positions: str) -> Tensor:
    """Keep the tokens of ``value_BTW`` [B, T, W] that ``positions`` names: [B, T, W], [B, L, W], [B, W] or [N, W].

    The mean is taken in float32 and cast back.
    """
    if positions == "all":
        return value_BTW * batch.mask[..., None]
    if positions == "first":
        first = batch.mask.int().argmax(1)
        return value_BTW[torch.arange(first.shape[0], device=first.device), first]
    if positions == "last":
        last = batch.mask.shape[1] - 1 - batch.mask.flip(1).int().argmax(1)
        return value_BTW[torch.arange(last.shape[0], device=last.device), last]
    if positions == "mean":
        total_BW = (value_BTW.float() * batch.mask[..., None]).sum(1)
        return (total_BW / batch.lengths[:, None]).to(value_BTW.dtype)
    if positions in ("masked", "labels"):
        return value_BTW.flatten(0, 1)[batch.scored]
    if positions.startswith("left"):
        real_BL = leftmost(batch, int(positions.removeprefix("left")))
        place_BL = batch.mask.int().argmax(1)[:, None] + torch.arange(real_BL.shape[1], device=real_BL.device)
        place_BLW = place_BL.clamp(max=batch.mask.shape[1] - 1)[..., None].expand(-1, -1, value_BTW.shape[-1])
        return value_BTW.gather(1, place_BLW).masked_fill(~real_BL[..., None], 0)
    raise ValueError(f"{positions!r} is no choice of tokens")


def leftmost(batch: Batch, tokens: int) -> Tensor:
    """[B, L] bool: which of the first L = ``tokens`` tokens each row has."""
    return torch.arange(tokens, device=batch.mask.device) < batch.lengths[:, None]


def narrowed(value: Tensor, kept: int) -> Tensor:
    """[..., M] the M = ``kept`` numbers of the vectors ``value`` [..., W] that the form ``widthM`` keeps."""
    return value[..., torch.tensor(neurons(value.shape[-1], kept), device=value.device)]
