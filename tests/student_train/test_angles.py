"""Distances, angles and directions, and the methods made of them: finite wherever points coincide or are too few."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "golden"))

from given import BERT, SMALL_BERT, make_batch, make_features, shape

from online.batch import Batch, Features, dense
from student_train.methods import parse_method
from student_train.methods.angles import angle_cosines, directions, distances
from student_train.methods.base import Method

RELATIONS: list[tuple[str, dict[str, object]]] = [
    ("ckd", {}),
    ("mgskd", {"heads": 3}),
    ("rkd", {}),
    ("lrc_bert", {}),
    ("fsp", {}),
    ("fsp", {"over": "width"}),
]


def made(name: str, options: dict[str, object]) -> Method:
    torch.manual_seed(0)
    return parse_method(name, options, shape(SMALL_BERT), shape(BERT))


def both(method: Method, batch: Batch) -> tuple[Features, Features]:
    student, teacher = (
        make_features(method.student_keys, shape(SMALL_BERT), batch, 1),
        make_features(method.teacher_keys, shape(BERT), batch, 2),
    )
    return {key: value.requires_grad_() for key, value in student.items() if isinstance(value, Tensor)}, teacher


def slopes(method: Method, student: Features, teacher: Features, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """The sum of the terms, and its gradient in the student's features and the method's parameters."""
    loss = torch.stack(list(method(student, teacher, batch).values())).sum()
    found = torch.autograd.grad(loss, [*(dense(student, key) for key in student), *method.parameters()], allow_unused=True)
    return loss, [slope for slope in found if slope is not None]


def test_distances_and_their_slopes_are_those_of_the_formula() -> None:
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1)) + 50  # far from the origin, where dot products round
    weights = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(2))
    near = x.clone().requires_grad_()
    found = distances(near)
    exact = x.double().requires_grad_()
    away = ~torch.eye(5, dtype=torch.bool)
    expected = (exact[:, :, None] - exact[:, None]).square().sum(-1)[:, away].sqrt()
    torch.testing.assert_close(found[:, away].double(), expected, rtol=1e-5, atol=0)
    assert not found[:, ~away].any()
    (found * weights).sum().backward()
    (expected * weights.double()[:, away]).sum().backward()
    assert near.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(near.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_angles_are_those_of_known_triangles() -> None:
    sides = torch.tensor([[3.0, 4.0, 5.0], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [2.0, 2.0, 0.0], [0.0, 2.0, 2.0]])
    torch.testing.assert_close(angle_cosines(*sides.T), torch.tensor([0.0, 0.5, -1.0, 1.0, 0.0]))


def test_points_in_one_place_have_no_direction_no_angle_and_no_slope() -> None:
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [4.0, 6.0]], requires_grad=True)
    sides = distances(x)
    assert sides[0, 1] == 0
    assert sides[0, 2] == 5
    towards = directions(x[:, None] - x[None])
    torch.testing.assert_close(towards[2, 0], torch.tensor([0.6, 0.8]))
    assert not towards[0, 1].any()
    (sides[0, 1] + angle_cosines(sides[0, 1], sides[0, 2], sides[1, 2]) + towards[0, 1].sum()).backward()
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize(("name", "options"), RELATIONS)
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_equal_points_give_finite_losses_and_gradients(name: str, options: dict[str, object], side: str) -> None:
    method, batch = made(name, options), make_batch("phrases")
    student, teacher = both(method, batch)

    def flat(features: Features) -> Features:
        return {
            key: torch.ones_like(value).requires_grad_(value.requires_grad) for key, value in features.items() if isinstance(value, Tensor)
        }

    student, teacher = (student if side == "teacher" else flat(student)), (teacher if side == "student" else flat(teacher))
    loss, found = slopes(method, student, teacher, batch)
    assert torch.isfinite(loss)
    assert found
    assert all(torch.isfinite(slope).all() and slope.abs().max() < 1e3 for slope in found)


@pytest.mark.parametrize(("name", "options"), RELATIONS)
@pytest.mark.parametrize("row", [0, 4])
def test_a_batch_of_one_row_gives_finite_losses_and_gradients(name: str, options: dict[str, object], row: int) -> None:
    method, whole = made(name, options), make_batch("phrases")
    values = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
    batch = Batch(**{name: value if value is None else value[row : row + 1] for name, value in values.items()})
    loss, found = slopes(method, *both(method, batch), batch)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(slope).all() for slope in found)
    assert all(torch.isfinite(count) for count in method.counts(batch).values())
    if name == "rkd":
        assert loss == 0


@pytest.mark.parametrize(
    ("name", "options"), [("ckd", {"window": 5}), ("mgskd", {"heads": 3, "sample": 0, "token_layers": 3}), ("fsp", {"over": "width"})]
)
def test_documents_of_a_packed_row_do_not_see_each_other(name: str, options: dict[str, object]) -> None:
    method, apart = made(name, options), _documents(packed=False)
    student, teacher = both(method, apart)
    expected, counts = method(student, teacher, apart), method.counts(apart)
    packed = _documents(packed=True)

    def joined(features: Features) -> Features:
        """Two rows of 4 and 3 tokens as one."""
        return {key: torch.cat([value[:1, :4], value[1:, :3]], 1) for key, value in features.items() if isinstance(value, Tensor)}

    found = method(joined(student), joined(teacher), packed)
    for term, count in method.counts(packed).items():
        assert count == counts[term]
        torch.testing.assert_close(found[term], expected[term])


def _documents(*, packed: bool) -> Batch:
    if packed:
        mask, documents = torch.ones(1, 7, dtype=torch.bool), torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
        phrases = torch.tensor([[1, 2, 2, 3, 4, 5, 6]])
    else:
        mask, documents = torch.arange(4) < torch.tensor([[4], [3]]), None
        phrases = torch.tensor([[1, 2, 2, 3], [1, 2, 3, 0]])
    rows = torch.arange(len(mask))
    return Batch(rows, torch.ones_like(phrases), mask, None, documents, None, None, None, rows, phrases=phrases)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ckd", {"window": 4}, "window: expected an odd number, as many words on each side, found 4"),
        ("ckd", {"layers": [[1, 1]]}, "layers: layer_pair and layer_triple compare .* expected 3 or more pairs, or both 0; found 1"),
        ("ckd", {"word_pair": 0, "word_triple": 0, "layer_pair": 0, "layer_triple": 0}, "every weight is 0"),
        ("fsp", {"layers": [[1, 1]]}, "layers: a flow goes from one entry to the next: expected two or more, found one"),
        ("mgskd", {"heads": 5}, "heads: expected a number that divides the teacher's width 12, found 5"),
        ("mgskd", {"token_layers": 0}, "token_layers: expected at least 1 for tokens and phrases, or token: 0 and phrase: 0; found 0"),
        ("mgskd", {"token_layers": 3}, "token_layers: expected fewer than the 3 pairs of layers, or sample: 0; found 3"),
        ("rkd", {"distance": 0, "angle": 0}, "every weight is 0"),
        ("rkd", {"student_layer": 3}, "student_layer: the student has blocks 0 to 2, found 3"),
        ("lrc_bert", {"layers": [[1, 5]]}, "the teacher has blocks 0 to 4, found 5"),
    ],
)
def test_options_that_cannot_be_served_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(name, options)


def test_rows_without_phrases_are_refused_by_what_compares_them_alone() -> None:
    batch = make_batch()
    with pytest.raises(
        ValueError, match=r"expected rows with phrases, found rows without: build them with rows.phrases .* or set phrase: 0"
    ):
        made("mgskd", {"heads": 3}).counts(batch)
    without = made("mgskd", {"heads": 3, "phrase": 0})
    assert made("mgskd", {"heads": 3}).reads_phrases
    assert not without.reads_phrases
    assert without.counts(batch).keys() == {"token_pair", "token_triple", "sample"}


def test_methods_say_how_many_rows_they_compare() -> None:
    assert [made("rkd", options).least_rows for options in ({}, {"angle": 0})] == [3, 2]
    assert [made("mgskd", {"heads": 3, **options}).least_rows for options in ({}, {"sample": 0})] == [3, 1]
    assert made("lrc_bert", {}).least_rows == 2
