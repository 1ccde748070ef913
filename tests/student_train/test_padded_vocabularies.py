"""Student and teacher of one tokenizer whose vocabularies are padded to different sizes: the words that both have are compared."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "golden"))

from given import CLM, LLAMA, SMALL_LLAMA, make_batch, shape

from online import words
from online.batch import TopK
from online.words import Words
from store.features import FeatureKey
from student_train.methods import parse_method

MORE, FEWER = 64, 61
LOGITS = FeatureKey("lm_logits", positions="labels")
UNITS = 5


def sides(student: int, teacher: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mine, other = (3 * torch.randn(UNITS, MORE, generator=generator, dtype=torch.float64) for _ in range(2))
    other[:, FEWER:] += 4  # the words that the student lacks, or has for nothing, are among the likeliest
    return mine[:, :student].float(), other[:, :teacher].float()


def term(name: str, options: dict[str, object], student: int, teacher: int, form: str = "") -> tuple[Tensor, Tensor]:
    """The term on random logits, and its gradient in the student's."""
    small, large = (shape(sizes | {"vocab": vocab}, *CLM) for sizes, vocab in ((SMALL_LLAMA, student), (LLAMA, teacher)))
    method, batch = parse_method(name, options, small, large), make_batch("tokens")
    mine, other = sides(student, teacher)
    leaf = mine.clone().requires_grad_()
    answer: Tensor | TopK = other
    if form:
        log_probs, ids = other.log_softmax(-1).sort(descending=True)
        kept = int(form.removeprefix("top"))
        answer = TopK(ids[:, :kept], log_probs[:, :kept], log_probs[:, kept:].logsumexp(-1))
    (key,) = method.teacher_keys
    assert key.form == form
    value = next(iter(method({LOGITS: Words(leaf, None, student)}, {key: answer}, batch).values()))
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a)


@pytest.mark.parametrize("sizes", [(FEWER, MORE), (MORE, FEWER)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_dense_logits_are_compared_over_the_words_that_both_have(sizes: tuple[int, int], temperature: float) -> None:
    mine, other = (side[:, :FEWER].double() / temperature for side in sides(*sizes))
    expected = temperature**2 * sum(kl(p.softmax(0).tolist(), q.softmax(0).tolist()) for p, q in zip(other, mine, strict=True))
    found, slope = term("lm_kd", {"temperature": temperature}, *sizes)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(slope[:, :FEWER].double(), temperature * (mine.softmax(-1) - other.softmax(-1)), atol=1e-5, rtol=1e-4)
    assert (slope[:, FEWER:] == 0).all()


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "total_variation", "mse", "raw_mse", "skew_forward"])
def test_other_divergences_are_those_of_equal_vocabularies(divergence: str) -> None:
    options: dict[str, object] = {"divergence": divergence}
    equal, slope = term("lm_kd", options, FEWER, FEWER)
    for sizes in ((FEWER, MORE), (MORE, FEWER)):
        found, of_found = term("lm_kd", options, *sizes)
        torch.testing.assert_close(found, equal)
        torch.testing.assert_close(of_found[:, :FEWER], slope)


def test_likeliest_words_that_the_student_lacks_count_as_tail() -> None:
    mine, other = sides(FEWER, MORE)
    expected = 0.0
    lacking = 0
    for p, q in zip(other.double().softmax(-1).tolist(), mine.double().softmax(-1).tolist(), strict=True):
        kept = [word for word in sorted(range(MORE), key=lambda word: -p[word])[:8] if word < FEWER]
        lacking += 8 - len(kept)
        events = [p[word] for word in kept], [q[word] for word in kept]
        expected += kl([*events[0], 1 - sum(events[0])], [*events[1], 1 - sum(events[1])])
    assert lacking > 0
    found, slope = term("lm_kd", {"top": 8}, FEWER, MORE, "top8")
    assert found.item() == pytest.approx(expected, rel=1e-4)
    assert torch.isfinite(slope).all()


def test_likeliest_words_without_a_tail_leave_out_those_that_the_student_lacks() -> None:
    mine, other = sides(FEWER, MORE)
    expected = 0.0
    for p, q in zip(other.double(), mine.double(), strict=True):
        kept = [word for word in p.argsort(descending=True)[:8].tolist() if word < FEWER]
        expected += kl(p[kept].softmax(0).tolist(), q[kept].softmax(0).tolist())
    found, _ = term("lm_kd", {"top": 8, "tail": "none"}, FEWER, MORE, "top8")
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_words_that_only_the_student_has_are_no_part_of_the_tail() -> None:
    equal, slope = term("lm_kd", {"top": 8}, FEWER, FEWER, "top8")
    found, of_found = term("lm_kd", {"top": 8}, MORE, FEWER, "top8")
    torch.testing.assert_close(found, equal)
    torch.testing.assert_close(of_found[:, :FEWER], slope)
    assert (of_found[:, FEWER:] == 0).all()


@pytest.mark.parametrize("sizes", [(FEWER, MORE), (MORE, FEWER)])
@pytest.mark.parametrize("options", [{}, {"divergence": "reverse_kl"}, {"top": 8}])
def test_chunks_change_nothing(sizes: tuple[int, int], options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    form = "top8" if options.get("top") else ""
    whole = term("lm_kd", options, *sizes, form)
    monkeypatch.setattr(words, "AT_ONCE", 2 * MORE)
    monkeypatch.setattr(words, "SMALLEST", 1)
    for one, other in zip(term("lm_kd", options, *sizes, form), whole, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("options", [{"draws": 5}, {"top": 4, "draws": 5}, {"top": 4, "bands": 3}])
def test_forms_that_stand_for_a_whole_vocabulary_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"equal vocabularies .* found 61 and 64; dense logits .* and likeliest words \(top alone\) serve"):
        term("lm_kd", options, FEWER, MORE)


@pytest.mark.parametrize("name", ["lm_kd", "distilbert"])
def test_vocabularies_that_padding_does_not_explain_are_refused(name: str) -> None:
    small, large = (shape(SMALL_LLAMA | {"vocab": vocab}, *CLM) for vocab in (32_000, 50_257))
    with pytest.raises(ValueError, match="equal vocabularies of student and teacher, found 32000 and 50257; models of one tokenizer"):
        parse_method(name, {}, small, large)
    qwen = (shape(SMALL_LLAMA | {"vocab": vocab}, *CLM) for vocab in (151_936, 152_064))
    parse_method(name, {}, *qwen)
