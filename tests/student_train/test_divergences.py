"""Divergences of next-word distributions against their definitions in float64, word by word, and against each other."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from online import words
from student_train.methods.divergences import (
    Divergence,
    adaptive_kl,
    forward_kl,
    jsd,
    of_tokens,
    reverse_kl,
    skew_forward,
    skew_reverse,
    total_variation,
)
from student_train.methods.losses import MASKED

Formula = Callable[[list[float], list[float]], float]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mixed(p: list[float], q: list[float], share: float) -> list[float]:
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def head_and_tail(p: list[float], q: list[float], head: float) -> float:
    before, gaps = 0.0, [0.0, 0.0]
    for word in sorted(range(len(p)), key=lambda word: -p[word]):
        gaps[before >= head] += abs(p[word] - q[word])
        before += p[word]
    return (gaps[0] * kl(p, q) + gaps[1] * kl(q, p)) / sum(gaps)


FORMULAS: dict[str, tuple[Divergence, Formula]] = {
    "forward": (forward_kl, kl),
    "reverse": (reverse_kl, lambda p, q: kl(q, p)),
    "jsd": (
        partial(jsd, beta=0.3),
        lambda p, q: 0.3 * kl(p, mixed(p, q, 0.3)) + 0.7 * kl(q, mixed(p, q, 0.3)),
    ),
    "skew forward": (partial(skew_forward, alpha=0.1), lambda p, q: kl(p, mixed(p, q, 0.1))),
    "skew reverse": (partial(skew_reverse, alpha=0.1), lambda p, q: kl(q, mixed(p, q, 0.9))),
    "adaptive": (adaptive_kl, partial(head_and_tail, head=0.5)),
    "adaptive, long head": (partial(adaptive_kl, head=0.8), partial(head_and_tail, head=0.8)),
    "total variation": (total_variation, lambda p, q: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2),
}


def logits(seed: int, tokens: int = 6, words: int = 9) -> Tensor:
    return torch.randn(tokens, words, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("name", FORMULAS)
def test_a_divergence_is_its_formula(name: str) -> None:
    divergence, formula = FORMULAS[name]
    student, teacher = logits(1), logits(2)
    found = of_tokens(divergence, student, teacher)
    p, q = teacher.double().softmax(-1).tolist(), student.double().softmax(-1).tolist()
    assert found.tolist() == pytest.approx([formula(*pair) for pair in zip(p, q, strict=True)], rel=2e-5)
    assert of_tokens(divergence, teacher, teacher).abs().max() < 1e-6


@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_are_those_of_differences_and_none_reaches_the_teacher(name: str) -> None:
    divergence, _ = FORMULAS[name]
    student, teacher = logits(3, 2, 5).double().requires_grad_(), logits(4, 2, 5).double()

    def total(of_student: Tensor) -> Tensor:
        return divergence(teacher.log_softmax(-1), of_student.log_softmax(-1)).sum()

    if not name.startswith("adaptive"):  # whose weights change with the student, without gradient
        assert torch.autograd.gradcheck(total, (student,), atol=1e-6)
    (slope,) = torch.autograd.grad(total(student), student)
    leaf = student.detach().float().requires_grad_()
    of_tokens(divergence, leaf, teacher.float()).sum().backward()
    torch.testing.assert_close(leaf.grad.double() if leaf.grad is not None else None, slope, rtol=1e-4, atol=1e-5)


def test_adaptive_weights_carry_no_gradient() -> None:
    student, teacher = logits(5, 1, 6).double().requires_grad_(), logits(6, 1, 6).double()
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    p, q = log_p.exp()[0].tolist(), log_q.exp()[0].tolist()
    share = (head_and_tail(p, q, 0.5) - kl(q, p)) / (kl(p, q) - kl(q, p))
    (found,) = torch.autograd.grad(adaptive_kl(log_p, log_q).sum(), student, retain_graph=True)
    parts = [torch.autograd.grad(part(log_p, log_q).sum(), student, retain_graph=True)[0] for part in (forward_kl, reverse_kl)]
    torch.testing.assert_close(found, share * parts[0] + (1 - share) * parts[1])


def test_special_cases() -> None:
    log_p, log_q = logits(7).double().log_softmax(-1), logits(8).double().log_softmax(-1)
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    close(jsd(log_p, log_q, 0), forward_kl(log_p, log_q))
    close(jsd(log_p, log_q, 1), reverse_kl(log_p, log_q))
    close(jsd(log_p, log_q, 0.5), jsd(log_q, log_p, 0.5))
    for small in (1e-4, 1e-6):  # the interior of JSD vanishes towards its ends as a share of either KL
        torch.testing.assert_close(jsd(log_p, log_q, small) / small, forward_kl(log_p, log_q), rtol=100 * small, atol=1e-8)
        torch.testing.assert_close(jsd(log_p, log_q, 1 - small) / small, reverse_kl(log_p, log_q), rtol=100 * small, atol=1e-8)
    close(skew_forward(log_p, log_q, 0), forward_kl(log_p, log_q))
    close(skew_reverse(log_p, log_q, 0), reverse_kl(log_p, log_q))
    close(skew_reverse(log_p, log_q, 0.3), skew_forward(log_q, log_p, 0.3))
    assert (jsd(log_p, log_q, 0.5) < math.log(2)).all()


def test_a_word_that_the_teacher_lacks_costs_a_bounded_amount_where_it_is_mixed_in() -> None:
    teacher, student = logits(9, 1, 5).double(), torch.zeros(1, 5, dtype=torch.float64)
    teacher[0, 2] = MASKED
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    assert torch.isfinite(forward_kl(log_p, log_q)).all()
    assert reverse_kl(log_p, log_q) > 1e20
    p, q = log_p.exp()[0].tolist(), log_q.exp()[0].tolist()
    of_others = sum(b * math.log(b / (0.9 * a + 0.1 * b)) for a, b in zip(p, q, strict=True) if a > 0)
    assert skew_reverse(log_p, log_q, 0.1).item() == pytest.approx(of_others + 0.2 * math.log(10))


def test_chunks_and_padded_vocabularies_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = logits(10, 7, 9), logits(11, 7, 11)
    whole = of_tokens(reverse_kl, student, teacher)
    torch.testing.assert_close(whole, reverse_kl(teacher[:, :9].log_softmax(-1), student.log_softmax(-1)))
    leaf = student.clone().requires_grad_()
    of_tokens(reverse_kl, leaf, teacher).sum().backward()
    monkeypatch.setattr(words, "AT_ONCE", 20)  # one or two tokens of 9 and 11 words
    monkeypatch.setattr(words, "SMALLEST", 1)
    chunked = student.clone().requires_grad_()
    found = of_tokens(reverse_kl, chunked, teacher)
    found.sum().backward()
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(chunked.grad, leaf.grad)
    assert of_tokens(reverse_kl, student[:0], teacher[:0]).shape == (0,)
