"""Parts of features, read and put, against loops over single elements."""

import itertools
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor

from online.places import chosen, put

B, T, H, C = 3, 5, 4, 2
ROWS = torch.tensor([2, 0])
MASK = torch.tensor([[1, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]], dtype=torch.bool)
NUMBERS = torch.tensor([[4, 1, 0], [2, 3, 1]])


def tokens(rows: Tensor | None, positions: Tensor | None) -> Iterator[tuple[int, int]]:
    """Row and token of all chosen ones, in their order."""
    for place, row in enumerate(range(B) if rows is None else rows.tolist()):
        if positions is None:
            yield from ((row, token) for token in range(T))
        elif positions.dtype == torch.bool:
            yield from ((row, token) for token in range(T) if positions[row, token])
        else:
            yield from ((row, token) for token in positions[place].tolist())


@pytest.mark.parametrize("heads", [None, [1], [3, 0], slice(1, 3)])
@pytest.mark.parametrize("channels", [None, [1], slice(0, 1)])
@pytest.mark.parametrize(("rows", "positions"), [(None, None), (ROWS, None), (None, MASK), (ROWS, MASK), (ROWS, NUMBERS)])
@pytest.mark.parametrize("kind", ["feature", "attention"])
def test_what_is_put_lies_in_the_chosen_elements_alone(
    kind: str, rows: Tensor | None, positions: Tensor | None, heads: list[int] | slice | None, channels: list[int] | slice | None
) -> None:
    torch.manual_seed(0)
    feature = kind == "feature"
    x = torch.randn(B, T, H * C) if feature else torch.randn(B, H, T, T)
    of = H if feature else None
    wide = range(C if feature else T)
    head_numbers = numbers(heads, range(H))
    channel_numbers = numbers(channels, wide)
    expected, read = x.clone(), []
    values = iter(torch.arange(1000.0))
    order: Iterable[tuple[tuple[int, int], int]] = itertools.product(tokens(rows, positions), head_numbers)
    if not feature and positions is None:  # attention of all positions keeps its order: head before token
        order = [
            ((row, token), head) for row in (range(B) if rows is None else rows.tolist()) for head in head_numbers for token in range(T)
        ]
    for (row, token), head in order:
        for channel in channel_numbers:
            place = (row, token, head * C + channel) if feature else (row, head, token, channel)
            read.append(float(x[place]))
            expected[place] = next(values)
    found = chosen(x, rows=rows, positions=positions, heads=heads, of=of, channels=channels)
    assert found.flatten().tolist() == read
    before = x.clone()
    new = put(
        x, torch.arange(len(read), dtype=x.dtype).view(found.shape), rows=rows, positions=positions, heads=heads, of=of, channels=channels
    )
    assert torch.equal(new, expected)
    assert torch.equal(x, before)


def numbers(choice: list[int] | slice | None, every: range) -> list[int]:
    return list(every if choice is None else every[choice] if isinstance(choice, slice) else choice)


def test_shapes_are_those_of_ordinary_indexing_without_heads() -> None:
    x, logits = torch.randn(B, T, 8), torch.randn(B, 6)
    assert torch.equal(chosen(x, positions=MASK), x[MASK])
    assert torch.equal(chosen(x, rows=ROWS), x[ROWS])
    assert torch.equal(chosen(x, rows=ROWS, positions=NUMBERS), torch.stack([x[2, NUMBERS[0]], x[0, NUMBERS[1]]]))
    assert torch.equal(chosen(logits, rows=ROWS, channels=[5]), logits[ROWS][:, [5]])
    assert torch.equal(put(logits, logits[ROWS] + 1, rows=ROWS)[1], logits[1])
    assert torch.equal(put(logits, logits[ROWS] + 1, rows=ROWS)[ROWS], logits[ROWS] + 1)


def test_values_broadcast() -> None:
    x, vector_W = torch.randn(B, T, 8), torch.arange(8.0)
    new = put(x, vector_W, positions=MASK)
    assert torch.equal(new[MASK], vector_W.expand(int(MASK.sum()), 8))
    assert torch.equal(new[~MASK], x[~MASK])
    probs = put(torch.rand(B, H, T, T), 1 / T, heads=[2])
    assert (probs[:, 2] == 1 / T).all()
    assert (probs[:, 1] != 1 / T).all()


def test_the_choice_of_no_token_changes_nothing() -> None:
    x = torch.randn(B, T, 8)
    assert torch.equal(put(x, torch.zeros(0, 8), positions=torch.zeros_like(MASK)), x)


def test_gradients_reach_what_remains_and_what_is_new() -> None:
    x = torch.randn(B, T, 4, dtype=torch.float64, requires_grad=True)
    values = torch.randn(int(MASK.sum()), 2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, values: put(x, values, positions=MASK, heads=[1, 0], of=2, channels=[1]).sin(), (x, values))


def test_choices_that_the_tensor_lacks_are_refused() -> None:
    x, attention = torch.randn(B, T, 8), torch.rand(B, H, T, T)
    with pytest.raises(ValueError, match=r"heads: expected attention, or the number of heads"):
        chosen(x, heads=[0])
    with pytest.raises(ValueError, match=r"found \[3, 5, 8\] of 3 heads"):
        chosen(x, heads=[0], of=3)
    with pytest.raises(ValueError, match=r"found \[3, 4, 5, 5\] of 2 heads"):
        chosen(attention, of=2)
    with pytest.raises(ValueError, match=r"heads: expected numbers from 0 to 3, found 4 to 4"):
        chosen(attention, heads=[4])
    with pytest.raises(ValueError, match=r"rows: expected numbers from 0 to 2, found -1 to 0"):
        put(x, 0.0, rows=torch.tensor([0, -1]))
    with pytest.raises(ValueError, match=r"expected a mask of shape \[3, 5\], found \[5\]"):
        put(x, 0.0, positions=MASK[0])
    with pytest.raises(ValueError, match=r"expected numbers for each of 3 rows, found shape \[2, 3\]"):
        put(x, 0.0, positions=NUMBERS)
    with pytest.raises(ValueError, match=r"expected values of shape \[8, 8\], found \[3, 8\]"):
        put(x, torch.zeros(3, 8), positions=MASK)
    with pytest.raises(ValueError, match=r"expected values of type torch.float32, .* found torch.float64"):
        put(x, torch.zeros(8, dtype=torch.float64), positions=MASK)
