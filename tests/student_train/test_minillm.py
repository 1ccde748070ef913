"""MiniLLM's gradient on sampled responses against that of the divergence of whole responses, with every response written out."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from online.batch import IGNORED, Batch
from store.shape import ModelShape
from student_train.methods import parse_method
from student_train.methods.minillm import MiniLLM, later
from student_train.methods.writing import LOGITS

WORDS, LONGEST, END = 4, 3, 1
Response = tuple[int, ...]
RESPONSES: list[Response] = [
    words
    for length in range(1, LONGEST + 1)
    for words in itertools.product(range(WORDS), repeat=length)
    if END not in words[:-1] and (length == LONGEST or words[-1] == END)
]
"""All that end with END or have LONGEST words."""
PREFIXES = [words for length in range(LONGEST) for words in itertools.product(range(WORDS), repeat=length) if END not in words]


def method(**options: object) -> MiniLLM:
    shape = ModelShape.model_validate(
        dict(family="llama", layers=1, width=4, heads=1, kv_heads=1, head_width=4, vocab=WORDS, causal=True, pre_norm=True, windows=(None,))
        | {"head": "causal_lm"}
    )
    made = parse_method("minillm", options, shape, shape)
    assert isinstance(made, MiniLLM)
    return made


def tables(seed: int) -> dict[Response, Tensor]:
    """A model of words: [V] logits behind each prefix."""
    generator = torch.Generator().manual_seed(seed)
    return {prefix: torch.randn(WORDS, generator=generator, dtype=torch.float64) for prefix in PREFIXES}


def log_prob(model: dict[Response, Tensor], response: Response) -> Tensor:
    return torch.stack([model[response[:t]].log_softmax(-1)[word] for t, word in enumerate(response)]).sum()


def row(response: Response) -> Batch:
    """A prompt of two words, and the response."""
    ids = torch.tensor([[2, 3, *response, *[0] * (LONGEST - len(response))]])
    mask = torch.arange(ids.shape[1])[None] < 2 + len(response)
    labels = torch.full_like(ids, IGNORED)
    labels[0, 1 : 1 + len(response)] = torch.tensor(response)
    one = torch.zeros(1, dtype=torch.int64)
    return Batch(one, ids, mask, None, None, None, labels, None, one)


def terms(made: MiniLLM, student: dict[Response, Tensor], teacher: dict[Response, Tensor], response: Response) -> dict[str, Tensor]:
    logits, target = (torch.stack([model[response[:t]] for t in range(len(response))]) for model in (student, teacher))
    return made({LOGITS: logits}, {LOGITS: target}, row(response))


def trained(seed: int) -> dict[Response, Tensor]:
    return {prefix: logits.requires_grad_() for prefix, logits in tables(seed).items()}


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_mean_gradient_over_all_responses_is_that_of_the_divergence(clip: float | None) -> None:
    student, teacher, made = trained(1), tables(2), method(mix=0.0, clip=clip, length_norm=False)
    probs = {response: log_prob(student, response).exp() for response in RESPONSES}
    assert sum(prob.item() for prob in probs.values()) == pytest.approx(1)
    whole = torch.stack([prob * (prob.log() - log_prob(teacher, response)) for response, prob in probs.items()]).sum()
    exact = torch.autograd.grad(whole, list(student.values()), retain_graph=True)
    drawn = torch.stack(
        [
            prob.detach().float() * torch.stack(list(terms(made, student, teacher, response).values())).sum()
            for response, prob in probs.items()
        ]
    )
    for found, expected in zip(torch.autograd.grad(drawn.sum(), list(student.values())), exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert expected.abs().max() > 1e-4


def test_under_mixed_sampling_weights_give_back_the_students_mean() -> None:
    student, teacher, made = trained(3), tables(4), method(mix=0.3, clip=None)
    p, q = teacher[()].softmax(-1), student[()].softmax(-1)
    total = sum((0.3 * p[word] + 0.7 * q[word]).item() * terms(made, student, teacher, (word,))["single"] for word in range(WORDS))
    assert isinstance(total, Tensor)
    (found,) = torch.autograd.grad(total, [student[()]], retain_graph=True)
    exact = (q * (q / p).log()).sum()
    assert total.item() == pytest.approx(exact.item(), rel=1e-5)
    torch.testing.assert_close(found, torch.autograd.grad(exact, [student[()]])[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("length_norm", [True, False])
@pytest.mark.parametrize("response", [(0, 2, 3), (2, 1), (1,)])
def test_a_word_answers_for_the_later_ones(response: Response, length_norm: bool) -> None:
    student, teacher = trained(5), tables(6)
    found = terms(method(mix=0.0, length_norm=length_norm), student, teacher, response)
    rewards = [
        (teacher[response[:t]].log_softmax(-1)[word] - student[response[:t]].log_softmax(-1)[word]).item()
        for t, word in enumerate(response)
    ]
    returns = [sum(rewards[t + 1 :]) / (max(1, len(response) - t - 1) if length_norm else 1) for t in range(len(response))]
    assert found["long"].item() == pytest.approx(-sum(returns), rel=1e-5, abs=1e-6)
    kls = [
        sum(
            math.exp(b) * (b - a)
            for a, b in zip(*(model[response[:t]].log_softmax(-1).tolist() for model in (teacher, student)), strict=True)
        )
        for t in range(len(response))
    ]
    assert found["single"].item() == pytest.approx(sum(kls), rel=1e-5)
    slopes = torch.autograd.grad(found["long"], list(student.values()), allow_unused=True)
    for prefix, slope in zip(student, slopes, strict=True):
        if prefix == response[: len(prefix)] and len(prefix) < len(response):
            shares = student[prefix].softmax(-1).detach()
            expected = -returns[len(prefix)] * (torch.nn.functional.one_hot(torch.tensor(response[len(prefix)]), WORDS) - shares)
            torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-6)
        else:
            assert slope is None or not slope.any()


def test_a_far_word_of_bad_outcome_is_clipped_from_below_and_one_of_good_outcome_from_above() -> None:
    teacher = tables(7)
    for favoured, sign in ((True, 1.0), (False, -1.0)):  # q / (.9 p + .1 q) of the first word: above 1.2, below .8
        student = trained(8)
        with torch.no_grad():
            student[()][0] += 6.0 if favoured else -6.0
            teacher[(0,)][2] = student[(0,)][2] + sign * 9  # what follows is good or bad news
        slopes = {}
        for clip in (None, 0.2):
            long = terms(method(mix=0.9, clip=clip), student, teacher, (0, 2))["long"]
            slopes[clip] = torch.autograd.grad(long, student[()])[0]
        assert slopes[None].abs().max() > 1e-4
        assert not slopes[0.2].any()


def test_returns_of_rows_do_not_mix() -> None:
    labels = torch.tensor([[IGNORED, 5, 6, 7], [IGNORED, IGNORED, 8, IGNORED], [IGNORED, 9, IGNORED, 4]])
    one = torch.arange(3)
    batch = Batch(one, torch.ones(3, 4).long(), torch.ones(3, 4, dtype=torch.bool), None, None, None, labels, None, one)
    rewards = torch.tensor([1.0, 10.0, 100.0, 7.0, 20.0, 3.0])
    assert later(rewards, batch, False).tolist() == [110.0, 100.0, 0.0, 0.0, 3.0, 0.0]
    assert later(rewards, batch, True).tolist() == [55.0, 100.0, 0.0, 0.0, 3.0, 0.0]
