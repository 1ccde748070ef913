"""What methods with several teachers draw, share out and refuse; their numbers are in golden/methods."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "golden"))

from given import BERT, CHOICES, CLASSES, MLM, SCORES, SMALL_BERT, TOKENS, make_batch, make_features, shape

from online.batch import Features
from store.features import FeatureKey
from student_train.methods import parse_method
from student_train.methods.base import Method
from student_train.methods.dgkd import DGKD
from student_train.moment import Moment

LOGITS = FeatureKey("task_logits", positions="row")
NAMES = ("small", "middle", "large")


def built(name: str, options: dict[str, object], head: tuple[str, int] = CLASSES, names: tuple[str, ...] = NAMES) -> Method:
    return parse_method(name, options, shape(SMALL_BERT, *head), {teacher: shape(BERT, *head) for teacher in names})


def dgkd(**options: object) -> DGKD:
    method = built("dgkd", options)
    assert isinstance(method, DGKD)
    return method


def survivors(method: DGKD, steps: int, seed: int = 0) -> list[tuple[str, ...]]:
    found = []
    for step in range(steps):
        method.moment = Moment(step, steps, 10.0, seed)
        found.append(tuple(method.survivors()))
        assert tuple(method.survivors()) == found[-1]
    return found


def test_a_teacher_survives_a_step_with_its_probability_alone() -> None:
    found = survivors(dgkd(survival=0.6), 3000)
    for name in NAMES:
        assert sum(name in step for step in found) / 3000 == pytest.approx(0.6, abs=0.03)
    together = sum("small" in step and "large" in step for step in found) / 3000
    assert together == pytest.approx(0.36, abs=0.03)
    assert sum(not step for step in found) / 3000 == pytest.approx(0.4**3, abs=0.02)


def test_draws_follow_from_seed_and_step_and_from_nothing_else() -> None:
    torch.manual_seed(1)
    first = survivors(dgkd(), 50)
    torch.manual_seed(2)
    assert survivors(dgkd(), 50) == first
    assert survivors(dgkd(), 50, seed=1) != first


def test_a_fixed_number_is_dropped_each_as_often_as_the_others() -> None:
    found = survivors(dgkd(drop=2), 3000)
    assert {len(step) for step in found} == {1}
    for name in NAMES:
        assert sum(name in step for step in found) / 3000 == pytest.approx(1 / 3, abs=0.03)


def test_all_teachers_answer_when_the_student_is_measured() -> None:
    method = dgkd(survival=0.001).eval()
    assert set(survivors(method, 20)) == {NAMES}


def test_a_step_without_survivors_learns_from_labels_alone() -> None:
    method, batch = dgkd(survival=1e-9), make_batch("classes")
    logits = torch.randn(5, 3, requires_grad=True)
    terms = method({LOGITS: logits}, {LOGITS.of(name): torch.randn(5, 3) for name in NAMES}, batch)
    assert terms["soft"] == 0
    (gradient,) = torch.autograd.grad(terms["soft"], logits, retain_graph=True)
    assert not gradient.any()
    (gradient,) = torch.autograd.grad(terms["hard"], logits)
    assert gradient.any()


def taught(name: str, options: dict[str, object], student: Tensor) -> Tensor:
    """[rows, teachers]: the gradient of ``soft`` in each teacher's logits, 0 where a row does not learn from it."""
    method, batch = built(name, options), make_batch("classes")
    logits = {LOGITS.of(teacher): torch.randn(5, 3, requires_grad=True) for teacher in NAMES}
    soft = method({LOGITS: student}, dict(logits), batch)["soft"]
    return torch.stack([gradient.abs().sum(1) for gradient in torch.autograd.grad(soft, list(logits.values()))], 1)


UNSURE_FIRST = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0], [8, 0, 0]])
"""Logits of five rows, the less uncertain the further down."""


def test_the_most_uncertain_rows_learn_from_the_smallest_teacher() -> None:
    order = torch.tensor([3, 0, 4, 2, 1])
    adopted = taught("uncertainty", {}, UNSURE_FIRST[order]) > 0
    assert adopted.sum(1).tolist() == [1] * 5
    teacher = adopted.int().argmax(1)
    assert {int(place): int(number) for place, number in zip(order, teacher, strict=True)} == {0: 0, 1: 1, 2: 1, 3: 2, 4: 2}


@pytest.mark.parametrize("by", ["entropy", "margin", "confidence"])
def test_a_fraction_of_the_rows_learns_from_teachers_and_all_learn_from_labels(by: str) -> None:
    options: dict[str, object] = {"fraction": 0.4, "by": by, "adoption": "soft"}
    assert (taught("uncertainty", options, UNSURE_FIRST) > 0).any(1).tolist() == [True, True, False, False, False]
    method, batch, student = built("uncertainty", options), make_batch("classes"), UNSURE_FIRST.clone().requires_grad_()
    terms = method({LOGITS: student}, {LOGITS.of(name): torch.randn(5, 3) for name in NAMES}, batch)
    (gradient,) = torch.autograd.grad(terms["hard"], student)
    assert gradient.any(1).tolist() == [True, True, False, True, True]  # the third has no label


def test_a_share_that_rounds_to_nothing_still_leaves_a_row() -> None:
    assert (taught("uncertainty", {"fraction": 0.01}, UNSURE_FIRST) > 0).any(1).tolist() == [True, False, False, False, False]


@pytest.mark.parametrize(("by", "chosen"), [("margin", 0), ("entropy", 1), ("confidence", 1)])
def test_a_margin_is_small_where_two_classes_compete_and_entropy_large_where_all_do(by: str, chosen: int) -> None:
    student = torch.tensor([[5.0, 5.0, -9.0], [0.5, 0.0, 0.0], [9.0, 0, 0], [9.0, 0, 0], [9.0, 0, 0]])
    assert (taught("uncertainty", {"fraction": 0.2, "by": by}, student) > 0).any(1).nonzero().flatten().tolist() == [chosen]


def test_a_teacher_that_is_wrong_counts_less() -> None:
    method, batch = built("mt_bert", {"hidden": 0}, names=("right", "wrong")), make_batch("classes")
    labels = torch.tensor([0, 2, 0, 1, 2])
    right = torch.nn.functional.one_hot(labels, 3) * 20.0
    logits: Features = {LOGITS.of("right"): right, LOGITS.of("wrong"): right.roll(1, 1)}
    student = torch.zeros(5, 3, requires_grad=True)
    soft = method({LOGITS: student}, logits, batch)["soft"]
    # each of the four labelled rows: log 3 from the right teacher, log 3 / (1 + 20) from the wrong one
    assert soft.item() == pytest.approx(4 * math.log(3) * (1 + 1 / 21), rel=1e-5)


def test_headers_average_into_one_linear_layer() -> None:
    method = built("tmkd", {})
    assert not isinstance(method, DGKD)
    state = make_features(frozenset({FeatureKey("final", positions="first")}), shape(SMALL_BERT), make_batch(), 1)
    (vector,) = state.values()
    assert isinstance(vector, Tensor)
    headers = [module for module in method.modules() if isinstance(module, torch.nn.Linear)]
    assert len(headers) == 3
    mean = torch.stack([header(vector) for header in headers]).mean(0)
    weight, bias = (torch.stack([getattr(header, name) for header in headers]).mean(0) for name in ("weight", "bias"))
    torch.testing.assert_close(mean, vector @ weight.T + bias)


def test_what_cannot_be_served_is_refused_with_what_would() -> None:
    for name in ("uncertainty", "mt_bert"):
        with pytest.raises(ValueError, match=f"method {name}: a head with one label gives scores.*dgkd"):
            built(name, {}, SCORES)
    for name in ("uncertainty", "mt_bert", "dgkd", "tmkd"):
        with pytest.raises(ValueError, match="task_logits needs a student with a head of classification"):
            built(name, {}, MLM)
        student, other = shape(SMALL_BERT, *CLASSES), shape(BERT, "classification", 4)
        with pytest.raises(ValueError, match=r"equal numbers of labels \(teacher large\) of student and teacher, found 3 and 4"):
            parse_method(name, {}, student, {"small": shape(BERT, *CLASSES), "large": other})
        with pytest.raises(ValueError, match=r"equal heads \(teacher large\)"):
            parse_method(name, {}, student, {"small": shape(BERT, *CLASSES), "large": shape(BERT, *TOKENS)})
    with pytest.raises(ValueError, match="drop: expected fewer than the 3 teachers, found 3"):
        built("dgkd", {"drop": 3})
    with pytest.raises(ValueError, match="hidden goes with rows of classes, a head of classification; found multiple_choice"):
        built("uncertainty", {"hidden": 1}, CHOICES)
    with pytest.raises(ValueError, match=r"equal widths \(teacher small\) of student and teacher, found 8 and 12; hidden: 0 leaves"):
        built("uncertainty", {"hidden": 1})
