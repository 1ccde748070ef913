"""Who may attend whom, and where in its document a token stands.

Shapes: B rows, T padded tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from online.batch import PADDING, Batch
from store.shape import ModelShape, Wiring


def pair_mask(batch: Batch, shape: ModelShape, layer: int) -> Tensor:
    """Whether a token (second to last dimension) may attend another (last), [B, 1, T, T] bool, in block ``layer`` from 1.

    Padding is attended by none; rows of padding itself may be all False, but padding that a row keeps attends the text. A causal window
    counts the token itself, a bidirectional one reaches as many tokens to each side, as in transformers.masking_utils.
    """
    place_T = torch.arange(batch.mask.shape[1], device=batch.mask.device)
    back_TT = place_T[:, None] - place_T[None, :]
    window = shape.windows[layer - 1]
    if shape.causal:
        reach_TT = back_TT >= 0 if window is None else (back_TT >= 0) & (back_TT < window)
    else:
        reach_TT = torch.ones_like(back_TT, dtype=torch.bool) if window is None else back_TT.abs() <= window
    pairs_B1TT = reach_TT & batch.mask[:, None, None, :]
    if batch.documents is not None:
        sees_BT = batch.documents.masked_fill(batch.documents == PADDING, 0)
        pairs_B1TT = pairs_B1TT & (sees_BT[:, None, :, None] == batch.documents[:, None, None, :])
    return pairs_B1TT


def token_positions(batch: Batch) -> Tensor:
    """[B, T] int64 position of each token in its document, from 0; padding does not count, wherever it stands."""
    if batch.position_ids is not None:
        return batch.position_ids
    return (batch.mask.long().cumsum(1) - 1).clamp(min=0)


def causality_suffices(batch: Batch, shape: ModelShape, wiring: Wiring) -> bool:
    """Whether a token sees what it may where each sees those before it: rows of one document, padded on the right, in a causal model.

    Padding then sees tokens, and none sees padding. Not where rotary frequencies follow from the highest position, padding's included.
    """
    return shape.causal and batch.documents is None and not wiring.rotary_by_length and batch.padded_behind


def running_positions(batch: Batch, config: PreTrainedConfig) -> Tensor:
    """[B, T] int64 from 0 to T - 1 in each row, as far as the model has positions; on tokens the same as :func:`token_positions`.

    Positions that stop would look like another packed document to transformers.
    """
    most = getattr(config, "max_position_embeddings", None) or batch.mask.shape[1]
    place_T = torch.arange(batch.mask.shape[1], device=batch.mask.device)
    return place_T.clamp(max=most - 1).expand(batch.mask.shape)


def document_masks(
    batch: Batch, shape: ModelShape, kinds: Sequence[str] | None, additive: torch.dtype | None
) -> Tensor | dict[str, Tensor]:
    """Masks of packed rows in the form that transformers' models take: [B, 1, T, T], True where a pair attends.

    Args:
        kinds: type of each block where the model takes one mask for each type, else None.
        additive: for eager attention, 0 where a pair attends and the lowest number of this type elsewhere.
    """
    layers = {"": 1} if kinds is None else {kind: layer for layer, kind in enumerate(kinds, start=1)}
    masks = {kind: pair_mask(batch, shape, layer) for kind, layer in layers.items()}
    if additive is not None:
        masks = {kind: as_added(mask, additive) for kind, mask in masks.items()}
    return masks[""] if kinds is None else masks


def as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """For eager attention: 0 where ``mask`` is True and the lowest number of ``dtype`` elsewhere."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
