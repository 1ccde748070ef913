"""What lm_kd's divergences come to at large temperatures, in chunks and from all words kept, and which options it refuses."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "golden"))

from given import CLM, LLAMA, SMALL_LLAMA, make_batch, make_features, shape

from online import words
from online.batch import Batch, TopK, dense
from store.features import FeatureKey
from student_train.methods import parse_method
from student_train.methods.losses import kl

STUDENT, TEACHER = shape(SMALL_LLAMA, *CLM), shape(LLAMA, *CLM)
OTHERS = ("reverse_kl", "jsd", "skew_forward", "skew_reverse", "adaptive_kl", "total_variation", "mse")
LOGITS = FeatureKey("lm_logits", positions="labels")


def answer(options: dict[str, object]) -> tuple[torch.Tensor, torch.Tensor]:
    """The term and its gradient in the student's logits."""
    method, batch = parse_method("lm_kd", options, STUDENT, TEACHER), make_batch("tokens")
    student, teacher = given(batch)
    leaf = student.clone().requires_grad_()
    (key,) = method.teacher_keys
    if key.words:
        log_probs, ids = teacher.log_softmax(-1).sort(descending=True)
        found = {key: TopK(ids, log_probs, torch.full(ids.shape[:-1], torch.finfo(torch.float32).min))}
    else:
        found = {key: teacher}
    term = method({LOGITS: leaf}, found, batch)["words"]
    return term.detach(), torch.autograd.grad(term, leaf)[0]


def given(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = (make_features(frozenset({LOGITS}), one, batch, seed) for one, seed in ((STUDENT, 1), (TEACHER, 2)))
    return dense(student, LOGITS), dense(teacher, LOGITS)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_default_is_the_plain_kl_to_the_bit(temperature: float) -> None:
    student, teacher = given(make_batch("tokens"))
    leaf = student.clone().requires_grad_()
    expected = kl(leaf, teacher, temperature).sum()
    found, slope = answer({"temperature": temperature})
    assert torch.equal(found, expected)
    assert torch.equal(slope, torch.autograd.grad(expected, leaf)[0])


@pytest.mark.parametrize("divergence", ["forward_kl", *OTHERS[:-1]])
def test_no_gradient_shrinks_or_grows_with_the_temperature(divergence: str) -> None:
    some, more = (answer({"divergence": divergence, "temperature": temperature})[1] for temperature in (200.0, 400.0))
    assert some.norm().item() == pytest.approx(more.norm().item(), rel=0.1)
    assert some.norm() > 0


def test_the_mse_is_twice_the_kl_at_a_large_temperature() -> None:
    (term, slope), (warm, of_warm) = answer({"divergence": "mse"}), answer({"temperature": 1000.0})
    assert term.item() == pytest.approx(2 * warm.item(), rel=0.02)
    torch.testing.assert_close(slope, 2 * of_warm, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("divergence", OTHERS)
def test_chunks_change_nothing(divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, object] = {"divergence": divergence} | ({} if divergence == "mse" else {"temperature": 2})
    whole = answer(options)
    monkeypatch.setattr(words, "AT_ONCE", 25)  # two tokens of 11 words
    monkeypatch.setattr(words, "SMALLEST", 1)
    for one, other in zip(answer(options), whole, strict=True):
        torch.testing.assert_close(one, other)


def test_all_words_kept_teach_what_dense_logits_do() -> None:
    for one, other in zip(answer({"divergence": "skew_forward", "top": 11}), answer({"divergence": "skew_forward"}), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("divergence", [name for name in OTHERS if name != "skew_forward"])
@pytest.mark.parametrize("tail", ["ghost", "none"])
def test_what_needs_every_word_is_refused_with_the_likeliest_ones(divergence: str, tail: str) -> None:
    message = rf"method lm_kd: divergence: {divergence} needs .* outside its top 5; leave top out: dense lm_logits follow from head_input"
    with pytest.raises(ValueError, match=message):
        parse_method("lm_kd", {"divergence": divergence, "top": 5, "tail": tail}, STUDENT, TEACHER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence: .*'forward_kl', 'reverse_kl'.*found 'kl'"),
        ({"beta": 0.5}, "beta: goes with divergence jsd, found divergence: forward_kl; leave beta out"),
        ({"divergence": "jsd", "alpha": 0.1}, "alpha: goes with divergence skew_forward or skew_reverse, found divergence: jsd"),
        ({"divergence": "reverse_kl", "head": 0.5}, "head: goes with divergence adaptive_kl, found divergence: reverse_kl"),
        ({"divergence": "jsd", "beta": 1.1}, "beta: .*less than or equal to 1"),
        ({"divergence": "skew_reverse", "alpha": 1}, "alpha: .*less than 1"),
        ({"divergence": "adaptive_kl", "head": 0}, "head: .*greater than 0"),
        ({"divergence": "mse", "temperature": 2}, "temperature: the mse of logits has none, .*found 2.0; leave it out"),
        ({"divergence": "skew_forward", "top": 5, "temperature": 2}, "temperature 1 only, found 2.*tail: none"),
    ],
)
def test_options_that_do_not_go_with_the_divergence_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method("lm_kd", options, STUDENT, TEACHER)
