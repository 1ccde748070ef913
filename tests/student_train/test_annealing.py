"""Annealing-KD and Continuation-KD over the steps of a run: what is learned when, and the hinge of each row by itself."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from online.batch import Batch
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods import parse_method
from student_train.methods.base import Method
from student_train.moment import Moment

LOGITS = FeatureKey("task_logits", positions="row")
STEPS = 4
"""Steps of an epoch."""


def shape(labels: int = 2, head: str = "classification") -> ModelShape:
    return ModelShape.model_validate(
        dict(family="bert", layers=2, width=8, heads=2, kv_heads=2, head_width=4, vocab=9, causal=False, pre_norm=False)
        | dict(windows=(None, None), head=head, labels=labels)
    )


def batch(rows: int) -> Batch:
    mask = torch.ones(rows, 2, dtype=torch.bool)
    return Batch(torch.arange(rows), mask.long(), mask, None, None, None, None, torch.zeros(rows), torch.arange(rows))


def terms(method: Method, student_BC: Tensor, teacher_BC: Tensor) -> dict[str, float]:
    found = method({LOGITS: student_BC}, {LOGITS: teacher_BC}, batch(len(student_BC)))
    return {name: term.item() for name, term in found.items()}


def phi_of(name: str, options: dict[str, object]) -> Callable[[int, int], float]:
    """Phi in a step of a run of so many epochs: the length of what a student at 0 is away from a teacher of length 1."""
    method = parse_method(name, options | ({"margin": 0.0} if name == "continuation_kd" else {}), shape(), shape())

    def phi(step: int, epochs: int) -> float:
        method.moment = Moment(step=step, steps=STEPS * epochs, epoch_steps=STEPS, seed=0)
        found = terms(method, torch.zeros(1, 2), torch.tensor([[0.6, 0.8]]))["logits"]
        soft = 1 - terms(method, torch.zeros(1, 2), torch.tensor([[0.0, 0.0]]))["hard"] / math.log(2) if name == "continuation_kd" else 1
        return math.sqrt(found / soft) if soft > 1e-6 else math.nan

    return phi


@pytest.mark.parametrize(("epochs", "levels"), [(30, 10), (21, 7), (10, 10), (7, 2)])
def test_annealed_logits_rise_by_one_level_after_an_equal_number_of_epochs(epochs: int, levels: int) -> None:
    phi = phi_of("annealing_kd", {"levels": levels})
    for epoch in range(epochs):
        temperature = levels - epoch * levels // epochs  # T_max, T_max - 1, ... 1
        for step in range(STEPS * epoch, STEPS * epoch + STEPS):
            assert phi(step, epochs) == pytest.approx(1 - (temperature - 1) / levels)


def test_a_phase_of_few_epochs_still_ends_with_the_teachers_own_logits() -> None:
    phi = phi_of("annealing_kd", {"levels": 7})
    assert [phi(STEPS * epoch, 3) for epoch in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert phi(0, 1) == 1


def test_annealing_by_step_goes_through_all_levels_within_one_epoch() -> None:
    phi = phi_of("annealing_kd", {"levels": 4, "by": "step"})
    assert [phi(step, 2) for step in range(8)] == pytest.approx([1 / 4, 1 / 4, 1 / 2, 1 / 2, 3 / 4, 3 / 4, 1, 1])


def test_continuation_takes_the_papers_numbers_in_its_thirty_epochs() -> None:
    method, phi = parse_method("continuation_kd", {}, shape(), shape()), phi_of("continuation_kd", {})
    for epoch in range(30):
        method.moment = Moment(step=STEPS * epoch + 1, steps=STEPS * 30, epoch_steps=STEPS, seed=0)
        psi = epoch / 40 if epoch <= 20 else 1
        found = terms(method, torch.zeros(1, 2), torch.tensor([[6.0, 8.0]]))
        assert found["hard"] == pytest.approx(psi * math.log(2))
        scale = (epoch // 3 + 1) / 10
        assert found["logits"] == pytest.approx((1 - psi) * ((10 * scale) ** 2 - scale), rel=1e-5)
        if psi < 1:
            assert phi(STEPS * epoch, 30) == pytest.approx(scale, rel=1e-4)


def test_a_row_within_its_margin_teaches_nothing_however_far_the_others_are() -> None:
    method = parse_method("continuation_kd", {"margin": 4.0, "levels": 1}, shape(), shape())
    student = torch.tensor([[1.0, 0.0], [5.0, 0.0]], requires_grad=True)
    method({LOGITS: student}, {LOGITS: torch.zeros(2, 2)}, batch(2))["logits"].backward()
    assert student.grad is not None
    assert torch.equal(student.grad, torch.tensor([[0.0, 0.0], [10.0, 0.0]]))


@pytest.mark.parametrize("name", ["annealing_kd", "continuation_kd"])
@pytest.mark.parametrize(
    ("options", "teacher", "message"),
    [
        ({"levels": 0}, shape(), "levels: .*greater than or equal to 1"),
        ({"by": "steps"}, shape(), "by: .*'epoch' or 'step', found 'steps'"),
        ({}, shape(labels=3), "equal numbers of labels of student and teacher, found 2 and 3"),
        ({}, shape(head="token_classification"), "equal heads"),
    ],
)
def test_bad_options_say_what_was_expected(name: str, options: dict[str, object], teacher: ModelShape, message: str) -> None:
    with pytest.raises(ValueError, match=f"method {name}: .*{message}"):
        parse_method(name, options, shape(), teacher)
