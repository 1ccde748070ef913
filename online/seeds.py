"""The torch half of store.seeds: the same random numbers, bit for bit, on a batch's device.

Shapes: B rows, T padded tokens, U units, C numbers of each.
"""

import torch
from torch import Tensor

from online.batch import Batch, take
from store.seeds import BITS, FIRST, GOLDEN, SECOND


def seeds(batch: Batch, positions: str) -> Tensor:
    """A seed for each token that ``positions`` keeps, int64: [B, T] for ``all`` (of no meaning on padding), else [B] or [N].

    What is kept of a row as a whole has the seed of its first token.
    """
    places_BT = _mixed(batch.mask.long().cumsum(1))
    row_B1 = (_mixed(places_BT ^ batch.input_ids) * batch.mask).sum(1, keepdim=True)
    seeds_BT = _mixed(row_B1 ^ places_BT)
    return seeds_BT if positions == "all" else take(seeds_BT[..., None], batch, "first" if positions == "mean" else positions).squeeze(-1)


def uniforms(seeds_U: Tensor, count: int) -> Tensor:
    """[U, C] independent numbers of each seed, C = ``count``, between 0 and 1 and never either, float64."""
    steps_C = torch.arange(1, count + 1, device=seeds_U.device) * _signed(GOLDEN)
    bits_UC = _shifted(_mixed(seeds_U[:, None] + steps_C), 64 - BITS)
    return (bits_UC.double() + 0.5) * 2.0**-BITS


def _mixed(values: Tensor) -> Tensor:
    values = (values ^ _shifted(values, 30)) * _signed(FIRST)
    values = (values ^ _shifted(values, 27)) * _signed(SECOND)
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """``values`` as unsigned numbers, shifted to the right."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    """The int64 of the same bits: torch multiplies these with the wrap-around that uint64 has."""
    return constant - (1 << 64)
