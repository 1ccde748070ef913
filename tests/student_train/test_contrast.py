"""The banks of contrast: what is drawn from them, what they become, and rows that they cannot serve."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "golden"))

from given import BERT, SMALL_BERT, make_batch, make_features, shape

from online.batch import Batch, Features
from student_train.methods import parse_method
from student_train.methods.contrast import Contrast
from student_train.moment import Moment
from student_train.step import Survey

SIZE = 6
LABELS = np.array([0, 0, 1, 2, 2, 2, 1, 0, 1, 2], np.float64)
NUMBERS = np.array([3, 4, 5, 9, 10, 11, 12, 20, 21, 30])
"""Training rows stand anywhere in a store."""


def made(negatives: int = 4, *, head: tuple[str, int] = ("base", 0), labels: np.ndarray = LABELS, **options: object) -> Contrast:
    torch.manual_seed(0)
    found = {"negatives": negatives, "dimensions": SIZE, **options}
    method = parse_method("contrast", found, shape(SMALL_BERT, *head), shape(BERT, *head))
    assert isinstance(method, Contrast)
    method.moment = Moment(step=4, steps=20, epoch_steps=5, seed=1)
    method.survey(Survey(rows=40, numbers=NUMBERS[: len(labels)], labels=labels))
    return method


def batch_of(places: list[int], labels: np.ndarray = LABELS) -> Batch:
    batch = make_batch()
    rows, of_rows = torch.from_numpy(NUMBERS[places]), torch.from_numpy(labels[places]).long()
    first = slice(0, len(places))
    return Batch(rows, batch.input_ids[first], batch.mask[first], None, None, None, None, of_rows, torch.arange(len(places)))


def features(method: Contrast, batch: Batch) -> tuple[Features, Features]:
    return make_features(method.student_keys, shape(SMALL_BERT), batch, 1), make_features(method.teacher_keys, shape(BERT), batch, 2)


def embedded(method: Contrast, batch: Batch) -> tuple[Tensor, Tensor]:
    student, teacher = features(method, batch)
    found = []
    for keys, values, layer in (
        (method.of_student, student, method.student_embedding),
        (method.of_teacher, teacher, method.teacher_embedding),
    ):
        vectors = layer(torch.cat([values[key] for key in keys], 1))
        found.append((vectors / vectors.norm(dim=1, keepdim=True)).detach())
    return found[0], found[1]


def test_negatives_are_different_rows_of_other_classes() -> None:
    method = made(6)
    drawn = method._drawn(batch_of([0, 3, 8]))
    for places, label in zip(drawn.tolist(), LABELS[[0, 3, 8]], strict=True):
        assert len(set(places)) == 6
        assert all(LABELS[place] != label for place in places)


def test_negatives_come_again_where_other_classes_have_too_few_rows() -> None:
    method = made(50)
    places = method._drawn(batch_of([3]))[0].tolist()
    assert set(places) == {place for place in range(10) if LABELS[place] != 2}


def test_negatives_depend_on_the_step_and_the_row_alone() -> None:
    method = made(4)
    together = method._drawn(batch_of([0, 3, 8]))
    assert torch.equal(method._drawn(batch_of([8, 1, 0]))[[2, 0]], together[[0, 2]])
    assert torch.equal(made(4)._drawn(batch_of([0, 3, 8])), together)
    method.moment = Moment(step=5, steps=20, epoch_steps=5, seed=1)
    assert not torch.equal(method._drawn(batch_of([0, 3, 8])), together)
    method.moment = Moment(step=4, steps=20, epoch_steps=5, seed=2)
    assert not torch.equal(method._drawn(batch_of([0, 3, 8])), together)


def test_every_row_of_another_class_is_drawn_about_as_often() -> None:
    method, seen = made(2), np.zeros(10)
    for step in range(400):
        method.moment = Moment(step=step, steps=400, epoch_steps=5, seed=1)
        np.add.at(seen, method._drawn(batch_of([2]))[0].numpy(), 1)
    expected = np.where(LABELS == 1, 0, 800 / 7)
    assert np.abs(seen - expected).max() < 5 * math.sqrt(800 / 7)
    assert not seen[LABELS == 1].any()


def test_a_step_moves_the_entries_of_its_rows_and_no_others() -> None:
    method, batch = made(momentum=0.75), batch_of([7, 2])
    before = {name: method.get_buffer(name).clone() for name in ("student_bank", "teacher_bank")}
    method(*features(method, batch), batch)
    for name, latest in zip(before, embedded(method, batch), strict=True):
        expected = before[name].clone()
        for place, vector in zip((7, 2), latest, strict=True):
            mixed = 0.75 * before[name][place] + 0.25 * vector
            expected[place] = mixed / mixed.norm()
        torch.testing.assert_close(method.get_buffer(name), expected)


def test_a_row_that_comes_twice_is_remembered_once_by_the_middle_of_both() -> None:
    method, batch = made(), batch_of([7, 2, 7])
    before = method.student_bank.clone()
    method(*features(method, batch), batch)
    first, _, last = embedded(method, batch)[0]
    middle = (first + last) / (first + last).norm()
    mixed = before[7] + middle
    torch.testing.assert_close(method.student_bank[7], mixed / mixed.norm())


def test_the_first_batch_fixes_the_normalisers() -> None:
    distinct = np.arange(10, dtype=np.float64)
    method, batch = made(9, labels=distinct), batch_of([0, 3], distinct)  # every other row is drawn
    assert not method.normalisers.any()
    banks = method.teacher_bank.clone(), method.student_bank.clone()
    method(*features(method, batch), batch)
    for anchors, bank, found in zip(embedded(method, batch), banks, method.normalisers.tolist(), strict=True):
        every = (anchors.double() @ bank.double().T / 0.07).exp()
        assert found == pytest.approx(float(every.mean()), rel=1e-5)
    fixed = method.normalisers.clone()
    other = batch_of([5, 6], distinct)
    method(*features(method, other), other)
    assert torch.equal(method.normalisers, fixed)


def test_measuring_leaves_everything_as_it_was_and_takes_rows_that_are_not_trained_on() -> None:
    method = made().eval()
    batch = batch_of([0, 1, 2])
    state = {name: value.clone() for name, value in method.state_dict().items()}
    held_out = Batch(torch.tensor([0, 39, 7]), batch.input_ids, batch.mask, None, None, None, None, None, batch.groups)
    for measured in (batch, held_out):
        assert torch.isfinite(method(*features(method, measured), measured)["contrast"])
    assert all(torch.equal(value, state[name]) for name, value in method.state_dict().items())


def test_the_banks_are_part_of_a_checkpoint_and_the_same_in_every_process() -> None:
    one, other = made(), made()
    assert one.state_dict().keys() >= {"student_bank", "teacher_bank", "normalisers"}
    assert one.student_bank.shape == one.teacher_bank.shape == (10, SIZE)
    assert torch.equal(one.student_bank, other.student_bank)
    assert not torch.equal(one.student_bank, one.teacher_bank)
    assert one.student_bank.norm(dim=1).mean() == pytest.approx(1, abs=0.25)


def test_a_small_temperature_gives_finite_losses_and_gradients() -> None:
    method, batch = made(temperature=0.01), batch_of([0, 3, 8])
    student, teacher = features(method, batch)
    loss = method(student, teacher, batch)["contrast"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(weight.grad).all() for weight in method.parameters() if weight.grad is not None)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (("classification", 1), "rows of other classes, and scores have none; rkd, and sentence with similarity"),
        (("multiple_choice", 1), "rows of multiple_choice have none"),
        (("token_classification", 3), "rows of token_classification have none"),
    ],
)
def test_a_student_whose_rows_have_no_classes_is_refused(head: tuple[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(head=head)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, math.nan], "expected a class for each row that is trained on, found rows without a label; rkd"),
        ([0.5, 1, 2], "expected a class for each row that is trained on, found scores"),
        ([1, 1, 1], "expected two classes or more, found one"),
    ],
)
def test_rows_without_classes_are_refused(labels: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(labels=np.array(labels))
