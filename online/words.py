"""Word logits that are made when they are asked for, a few tokens at a time.

For 16,000 tokens and a vocabulary of 150,000 words they would take 10 GB in float32; what the head takes in is a hundredth of that.

Shapes: B rows, T padded tokens, U units (the tokens that a key is about), M some of them, W width of the head's input, V words.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

AT_ONCE, AT_ONCE_ON_GPU = 1 << 22, 1 << 26
"""Logits of a chunk. 16 MB are memory that a process on a CPU keeps and uses again: with chunks of 64 MB a step takes longer, also longer
than with all logits at once. A GPU multiplies few tokens with a large head at a fraction of its speed."""

SMALLEST = 128
"""Tokens of a chunk, however large the vocabulary: each chunk reads the head's weight, and adds to its gradient, once. Chunks are about
equally long, so none has fewer than half as many."""

LEAST = 16
"""Rows of a product at least: of fewer, some processors sum in another order, and a word's answer would depend on the batch."""


@dataclass(frozen=True)
class Product:
    """A head whose weights are at hand, float32, outside of autocast."""

    weight: Tensor
    """[V, W]."""
    bias: Tensor | None
    """[V]."""
    cap: float | None = None
    """Logits are cap * tanh(logit / cap)."""

    def __call__(self, input_MW: Tensor) -> Tensor:
        with torch.autocast(input_MW.device.type, enabled=False):
            logits_MV = F.linear(input_MW, self.weight, self.bias)
            return logits_MV if self.cap is None else torch.tanh(logits_MV / self.cap) * self.cap

    def among(self, kept: Tensor) -> "Product":
        """The head of the words ``kept`` [K] alone: their rows are taken before the product, which is smaller by as many."""
        return Product(self.weight[kept], None if self.bias is None else self.bias[kept], self.cap)


@dataclass(frozen=True)
class Share:
    """A head that ranks hold together for the same tokens: each computes the logits of words of its own, [M, v] from ``first`` on."""

    head: Callable[[Tensor], Tensor]
    """[M, W] -> [M, v]; as that of Words."""
    first: int
    vocab: int
    """Words of all ranks."""
    gathered: Callable[[Tensor], Tensor]
    """[M, n] of this rank -> [R, M, n] of all R ranks; all call it at once."""


@dataclass(frozen=True)
class Words:
    """The logits [U, V] of a key of word logits, float32. All of them exist once ``logits`` or ``dense`` was asked for, and then stay."""

    input: Tensor
    """[U, W] what the head takes in; the logits themselves where there is no head."""
    head: Callable[[Tensor], Tensor] | None
    """[M, W] -> [M, V]; may be called at any time, inside and outside of Capture and autocast."""
    vocab: int
    places: Tensor | None = None
    """[U] where the units stand among all B * T tokens; None where they are not packed."""
    padded: torch.Size | None = None
    """[B, T], where ``places`` is given."""
    share: Share | None = None
    """This rank's part of a head that ranks hold together, whose ``head`` gathers the logits of all words on every rank."""

    @cached_property
    def logits(self) -> Tensor:
        """[U, V]."""
        return self.of(self.input)

    def dense(self) -> Tensor:
        """The logits as a tensor: [B, T, V] with zeros on padding where units are packed, else [U, V]."""
        if self.places is None or self.padded is None:
            return self.logits
        tokens, logits_UV = self.padded.numel(), self.logits
        if len(self.places) < tokens:
            logits_UV = logits_UV.new_zeros(tokens, self.vocab).index_copy(0, self.places, logits_UV)
        return logits_UV.unflatten(0, self.padded)

    def at(self, units: Tensor) -> "Words":
        """Of some ``units``: [U] bool, or their numbers."""
        return Words(self.input[units], self.head, self.vocab)

    def among(self, kept: Tensor) -> "Words":
        """Of the words ``kept`` [K] alone, in their order."""
        if isinstance(self.head, Product):
            return replace(self, head=self.head.among(kept), vocab=len(kept))
        return replace(self, head=lambda input_MW: self.of(input_MW)[:, kept], vocab=len(kept))

    def parts(self) -> list[int]:
        """How many units each chunk has; one chunk at least."""
        units = len(self.input)
        tokens = max(SMALLEST, (AT_ONCE_ON_GPU if self.input.is_cuda else AT_ONCE) // self.vocab)
        count = max(1, -(-units // tokens))
        return [units // count + (number < units % count) for number in range(count)]

    def chunks(self) -> Iterator[Tensor]:
        """[M, V] each, of the sizes that ``parts`` says."""
        parts = self.parts()
        if len(parts) == 1:
            yield self.logits
            return
        for input_MW in self.input.split(parts):
            yield self.of(input_MW)

    def shares(self) -> Iterator[Tensor]:
        """[M, v] each: this rank's part of ``chunks``, of which nothing is gathered."""
        assert self.share is not None
        for input_MW in self.input.split(self.parts()):
            yield _logits(self.share.head, input_MW)

    def of(self, input_MW: Tensor) -> Tensor:
        """[M, V] float32 logits of some units from their part of ``input``."""
        if self.head is None:
            return input_MW.float()
        return _logits(self.head, input_MW)


def _logits(head: Callable[[Tensor], Tensor], input_MW: Tensor) -> Tensor:
    units = len(input_MW)
    # An operand that lies elsewhere in memory, as a part of another may, rounds differently on some processors.
    fresh_MW = F.pad(input_MW, (0, 0, 0, LEAST - units)) if units < LEAST else input_MW.clone()
    return head(fresh_MW).float()[:units]


def each(compute: Callable[..., Tensor], *sides: Words | Tensor) -> Tensor:
    """[U, ...] what ``compute`` makes of each unit; differentiable. Chunks, where there are several, are computed again for the gradient.

    Args:
        compute: Takes a chunk of every side, of Words their logits [M, V], and gives [M, ...]; of each unit by itself.
        sides: Words, and tensors [U, ...] that go with them.
    """
    parts = max((side.parts() for side in sides if isinstance(side, Words)), key=len)
    if len(parts) == 1:
        return compute(*(side.logits if isinstance(side, Words) else side for side in sides))

    def chunk(*inputs: Tensor) -> Tensor:
        pairs = zip(sides, inputs, strict=True)
        return compute(*(side.of(part) if isinstance(side, Words) else part for side, part in pairs))

    columns = [(side.input if isinstance(side, Words) else side).split(parts) for side in sides]
    return torch.cat([checkpoint(chunk, *part, use_reentrant=False, preserve_rng_state=False) for part in zip(*columns, strict=True)])


def as_words(logits_UV: Tensor) -> Words:
    """Logits that are there already."""
    return Words(logits_UV, None, logits_UV.shape[-1])
