"""lm_kd on words drawn at random: its mean gradient is the whole prediction's, epochs take turns, and what would be wrong is refused."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "golden"))

from given import CLM, LLAMA, SMALL_LLAMA, make_batch, shape

from online.batch import Batch, Drawn, TopDrawn
from online.estimates import estimate
from online.word_forms import in_form
from store.features import FeatureKey
from store.forms import WordForm, word_form
from student_train.methods import parse_method
from student_train.methods.lm_kd import LMKD
from student_train.moment import Moment

STUDENT, TEACHER = shape(SMALL_LLAMA, *CLM), shape(LLAMA, *CLM)
LOGITS = FeatureKey("lm_logits", positions="labels")


def method_of(**options: object) -> LMKD:
    made = parse_method("lm_kd", options, STUDENT, TEACHER)
    assert isinstance(made, LMKD)
    return made


def form_of(text: str) -> WordForm:
    form = word_form(text)
    assert form is not None
    return form


def gradient(options: dict[str, object], student_V: torch.Tensor, teacher_V: torch.Tensor, number: int) -> torch.Tensor:
    """[number, V] the gradients of so many tokens with equal logits and different seeds."""
    labels = torch.zeros(number, 1, dtype=torch.int64)
    batch = Batch(torch.arange(number), labels, labels == 0, None, None, None, labels, None, torch.arange(number))
    method = method_of(**options)
    (key,) = method.teacher_keys
    state = torch.randint(-(2**62), 2**62, (number,), generator=torch.Generator().manual_seed(11))
    target = in_form(form_of(key.form), teacher_V.expand(number, -1), state)
    leaf = student_V.expand(number, -1).clone().requires_grad_()
    method({LOGITS: leaf}, {key: target}, batch)["words"].backward()
    assert leaf.grad is not None
    return leaf.grad.double()


@pytest.mark.parametrize(
    "options", [{"draws": 5}, {"draws": 5, "tau": 0.8}, {"top": 2, "draws": 3}, {"top": 3, "draws": 2, "samples": 2}], ids=str
)
def test_the_mean_gradient_of_drawn_words_is_that_of_the_whole_prediction(options: dict[str, object]) -> None:
    """Within 5.5 standard errors in each of 11 words, and closer with more draws: an error of 1 / sqrt(n)."""
    student, teacher = (torch.randn(11, generator=torch.Generator().manual_seed(seed)) * 1.5 for seed in (1, 2))
    exact = (student.double().softmax(0) - teacher.double().softmax(0)).expand(1, -1)
    found = gradient(options, student, teacher, 30_000)
    bound = 5.5 * found.std(0) / 30_000**0.5 + 1e-6
    assert ((found.mean(0) - exact[0]).abs() <= bound).all()
    few, many = ((found[:number].mean(0) - exact[0]).norm() for number in (100, 30_000))
    assert many < few / 3


@pytest.mark.parametrize("tail", ["ghost", "none"])
def test_the_mean_gradient_of_likeliest_words_is_another_one_however_many_tokens(tail: str) -> None:
    student, teacher = (torch.randn(11, generator=torch.Generator().manual_seed(seed)) * 1.5 for seed in (1, 2))
    exact = student.double().softmax(0) - teacher.double().softmax(0)
    for number in (10, 1000):
        found = gradient({"top": 3, "tail": tail}, student, teacher, number)
        assert found.std(0).max() < 1e-6
        assert (found.mean(0) - exact).norm() > 0.05 * exact.norm()


@pytest.mark.parametrize("form", ["draw4x3", "top2draw3x3"])
def test_each_epoch_learns_from_a_set_of_its_own_in_turn(form: str) -> None:
    named = form_of(form)
    options = {"top": named.top or None, "draws": named.draws, "samples": 3}
    batch, method = make_batch("tokens"), method_of(**{name: value for name, value in options.items() if value is not None})
    number = int(batch.labelled.sum())
    student, teacher = (torch.randn(number, 11, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    target = in_form(named, teacher, torch.arange(number) * 12345)
    assert isinstance(target, Drawn | TopDrawn)
    (key,) = method.teacher_keys
    assert key.form == form
    found = []
    for epoch in range(6):
        method.moment = Moment(step=epoch * 10 + 3, steps=60, epoch_steps=10.0, seed=0)
        found.append(method({LOGITS: student}, {key: target}, batch)["words"].item())
        words = estimate(target, named, epoch % 3)
        log_q = student.log_softmax(-1).gather(-1, words.ids)
        assert found[-1] == pytest.approx((words.weights * (words.logs - log_q)).sum().item(), rel=1e-5)
    assert found[:3] == found[3:]
    assert len(set(found)) == 3


DENSE = "leave draws out: dense lm_logits follow from head_input with its head"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 9, "divergence": "reverse_kl"}, f"divergence: reverse_kl does not follow from words drawn at random .draw9.* {DENSE}"),
        ({"top": 2, "draws": 3, "divergence": "skew_forward"}, f"divergence: skew_forward does not follow .*top2draw3.* {DENSE}"),
        ({"draws": 9, "divergence": "mse"}, f"divergence: mse does not follow .* {DENSE}"),
        ({"draws": 9, "temperature": 15.0}, f"temperature: 15.0 does not follow from words drawn at random .* {DENSE}"),
        ({"draws": 9, "temperature": {"kind": "linear", "start": 2, "end": 1}}, "temperature: .* does not follow"),
        ({"draws": 9, "tail": "none"}, "set top without draws"),
        ({"draws": 9, "tau": 0.805}, "tau: expected hundredths, such as 0.8 or 1.25, found 0.805"),
        ({"draws": 9, "nucleus": 0.9}, "nucleus: goes with top alone"),
        ({"draws": 9, "top": 2, "tau": 0.8}, "the others are drawn as they are; leave tau out"),
        ({"draws": 2, "top": 11}, "the vocabulary has 11 words, fewer than top11draw2 asks for with others to draw from"),
        ({"top": 4, "samples": 2}, "tau, samples: go with draws"),
        ({"top": 4, "least": 2}, "least: says how many words a nucleus has at least; set nucleus"),
        ({"top": 4, "nucleus": 0.9, "least": 5}, "at least 5 of at most 4 words"),
        ({"nucleus": 0.9}, "nucleus: goes with top .words at most.; set it, or leave nucleus out"),
        ({"tau": 0.8}, "tau: goes with draws"),
        ({"samples": 2}, "samples: goes with draws"),
        ({"top": 4, "nucleus": 0.9, "divergence": "jsd"}, "divergence: jsd needs .* outside its top 4; leave top out"),
        ({"top": 4, "nucleus": 0.9, "temperature": 2.0}, "the mass of the tail is known at temperature 1 only, found 2.0"),
        ({"top": 3, "bands": 4, "temperature": 2}, "at temperature 1 only, found 2.0; leave top out"),
        ({"top": 3, "bands": 4, "divergence": "reverse_kl"}, "reverse_kl needs what the teacher thinks of every word"),
        ({"top": 3, "bands": 4, "tail": "none"}, "set top without draws and bands"),
        ({"top": 3, "bands": 4, "nucleus": 0.5}, "leave draws and nucleus out, or bands"),
        ({"bands": 4}, "bands: goes with top"),
        ({"top": 3, "bands": 400}, "expected at most as many bands"),
    ],
)
def test_what_drawn_words_and_nuclei_cannot_serve_is_refused_with_what_would(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method("lm_kd", options, STUDENT, TEACHER)
