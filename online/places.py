"""Part of a feature: rows, positions, heads, channels, read out of one tensor and put into another.

Shapes: B rows, T padded tokens, W width of a feature, H heads, C outputs for a whole row; R chosen rows, P chosen tokens of each,
N chosen tokens of all rows, h heads, c channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Choice = Sequence[int] | slice | Tensor | None
"""Numbers from 0, a slice of them, or all."""


def chosen(
    x: Tensor,
    *,
    rows: Tensor | None = None,
    positions: Tensor | None = None,
    heads: Choice = None,
    of: int | None = None,
    channels: Choice = None,
) -> Tensor:
    """What ``rows``, ``positions``, ``heads`` and ``channels`` choose together of ``x``; None chooses all.

    Args:
        x: a feature [B, T, W], attention [B, H, T, T], or logits of whole rows [B, C].
        rows: [R] int64.
        positions: [B, T] bool; or [R, P] int64, tokens of each chosen row. Of attention, the tokens that attend.
        heads: of attention, or of a feature made of ``of`` heads.
        of: heads that W is made of, one after the other.
        channels: of W, of one head where ``of`` is given, or of C; of attention, the tokens that are attended to.

    Returns:
        With a mask of positions [N, c], in the order of rows and tokens; with numbers of positions [R, P, c]; with neither [R, T, c], and
        of [B, C] [R, c]. Where x has heads, they stand in front of c. Attention of all positions keeps its order, [R, h, T, c].

    Raises:
        ValueError: a choice that ``x`` does not have.
    """
    taken = _canonical(x, of)[_index(x, rows, positions, heads, of, channels)]
    return _natural(taken, x, positions, of)


def put(
    x: Tensor,
    values: Tensor | float,
    *,
    rows: Tensor | None = None,
    positions: Tensor | None = None,
    heads: Choice = None,
    of: int | None = None,
    channels: Choice = None,
) -> Tensor:
    """A copy of ``x`` that holds ``values`` in what ``chosen`` with the same choices reads; gradients reach both.

    Args:
        values: shape of what ``chosen`` returns, or one that broadcasts to it; the dtype of ``x``.

    Raises:
        ValueError: a choice that ``x`` does not have, or values of another shape or dtype.
    """
    index, copy = _index(x, rows, positions, heads, of, channels), x.clone()
    view = _canonical(copy, of)
    wanted = _natural(view[index], x, positions, of)
    new = torch.as_tensor(
        values, dtype=None if isinstance(values, Tensor) else x.dtype, device=None if isinstance(values, Tensor) else x.device
    )
    if new.dtype != x.dtype:
        raise ValueError(f"expected values of type {x.dtype}, as the tensor that they go into, found {new.dtype}")
    try:
        new = new.expand(wanted.shape)
    except RuntimeError:
        raise ValueError(f"expected values of shape {list(wanted.shape)}, found {list(new.shape)}") from None
    if _transposed(x, positions):
        new = new.transpose(1, 2)
    elif not _has_heads(x, of):
        new = new.unsqueeze(-2)
    if x.dim() == 2:
        new = new.unsqueeze(1)
    view[index] = new
    return copy


def _canonical(x: Tensor, of: int | None) -> Tensor:
    """A view [B, T, H, W / H], with axes of one element where ``x`` lacks them."""
    if x.dim() == 4 and of is None:
        return x.transpose(1, 2)
    if x.dim() == 2 and of is None:
        return x[:, None, None]
    if x.dim() != 3 or (of is not None and (of < 1 or x.shape[-1] % of)):
        raise ValueError(
            f"expected [rows, tokens, width], [rows, heads, tokens, tokens] or [rows, outputs], found {list(x.shape)} of {of} heads"
        )
    return x.unflatten(-1, (of or 1, -1))


def _index(x: Tensor, rows: Tensor | None, positions: Tensor | None, heads: Choice, of: int | None, channels: Choice) -> tuple[Tensor, ...]:
    """Indices into ``_canonical(x)`` that broadcast to what is chosen: [..., h, c]."""
    if heads is not None and not _has_heads(x, of):
        raise ValueError("heads: expected attention, or the number of heads that the width is made of (of)")
    count_B, count_T, count_H, count_W = _canonical(x, of).shape
    row_R = _numbers(rows, count_B, x, "rows")
    if positions is None:
        row, token = row_R[:, None], torch.arange(count_T, device=x.device)[None]
    elif positions.dtype == torch.bool:
        if positions.shape != (count_B, count_T):
            raise ValueError(f"positions: expected a mask of shape {[count_B, count_T]}, found {list(positions.shape)}")
        place, token = positions[row_R].nonzero(as_tuple=True)
        row = row_R[place]
    else:
        if positions.dim() != 2 or len(positions) != len(row_R):
            raise ValueError(f"positions: expected numbers for each of {len(row_R)} rows, found shape {list(positions.shape)}")
        row, token = row_R[:, None], _numbers(positions, count_T, x, "positions")
    head_h, channel_c = _numbers(heads, count_H, x, "heads"), _numbers(channels, count_W, x, "channels")
    return row[..., None, None], token[..., None, None], head_h[:, None], channel_c


def _numbers(choice: Choice, count: int, x: Tensor, name: str) -> Tensor:
    every = torch.arange(count, device=x.device)
    if choice is None or isinstance(choice, slice):
        return every if choice is None else every[choice]
    numbers = torch.as_tensor(choice, dtype=torch.int64, device=x.device)
    if numbers.numel() and (int(numbers.min()) < 0 or int(numbers.max()) >= count):
        raise ValueError(f"{name}: expected numbers from 0 to {count - 1}, found {int(numbers.min())} to {int(numbers.max())}")
    return numbers


def _natural(taken: Tensor, x: Tensor, positions: Tensor | None, of: int | None) -> Tensor:
    """[..., h, c] as ``chosen`` returns it."""
    if _transposed(x, positions):
        return taken.transpose(1, 2)
    taken = taken if _has_heads(x, of) else taken.squeeze(-2)
    return taken.squeeze(1) if x.dim() == 2 else taken


def _transposed(x: Tensor, positions: Tensor | None) -> bool:
    return x.dim() == 4 and positions is None


def _has_heads(x: Tensor, of: int | None) -> bool:
    return x.dim() == 4 or of is not None
