"""Annealing-KD and Continuation-KD: logits that grow to the teacher's."""

from collections.abc import Callable

import torch
from case import Case
from formulas import hard_choices, hard_classes, hard_scores, hard_tokens
from given import CHOICES, CLASSES, GROUPS, ROWS, SCORES, TOKENS, Given
from torch import Tensor

from student_train.moment import Moment

Hard = Callable[[Given], tuple[Tensor, float]]
Answers = list[slice | int]

FOURTH_EPOCH = Moment(step=9, steps=12, epoch_steps=2.5, seed=0)
"""Epoch 3, from 0, of 5; three quarters of the steps."""


def squared(g: Given, at: slice | int, phi: float) -> Tensor:
    s, t = g.S["task_logits"][at].flatten(), g.T["task_logits"][at].flatten()
    return sum(((s[c] - phi * t[c]) ** 2 for c in range(len(s))), torch.zeros(()))


def annealing(phi: float, answers: Answers) -> Callable[[Given], dict[str, tuple[Tensor, float]]]:
    return lambda g: {"logits": (sum((squared(g, at, phi) for at in answers), torch.zeros(())), len(answers))}


def continuation(psi: float, phi: float, margin: float, hard: Hard, answers: Answers) -> Callable[[Given], dict[str, tuple[Tensor, float]]]:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        over = [squared(g, at, phi) - margin * phi for at in answers]
        within = [value for value in over if value <= 0]
        assert bool(within) == (margin > 5)
        hinge = sum((value for value in over if value > 0), torch.zeros(()))
        loss, count = hard(g)
        return {"hard": (psi * loss, count), "logits": ((1 - psi) * hinge, len(answers))}

    return reference


CASES: dict[str, Case] = {
    "annealing_kd": Case(
        "annealing_kd", {"levels": 3}, annealing(2 / 3, ROWS), head=CLASSES, labels="classes", moment=FOURTH_EPOCH, zero=False
    ),
    "annealing_kd few epochs": Case("annealing_kd", {}, annealing(4 / 5, ROWS), head=SCORES, moment=FOURTH_EPOCH, zero=False),
    "annealing_kd last": Case(
        "annealing_kd", {"by": "step", "levels": 3}, annealing(1, ROWS), head=TOKENS, labels="tokens", moment=FOURTH_EPOCH
    ),
    "annealing_kd choices": Case("annealing_kd", {"by": "step"}, annealing(1 / 7, GROUPS), head=CHOICES, labels="choices", zero=False),
    "continuation_kd": Case(
        "continuation_kd",
        {"levels": 3, "margin": 12},
        continuation(9 / 20, 2 / 3, 12, hard_classes, ROWS),
        head=CLASSES,
        labels="classes",
        moment=FOURTH_EPOCH,
        zero=False,
    ),
    "continuation_kd scores": Case(
        "continuation_kd",
        {"margin": 0.01, "levels": 2, "by": "step"},
        continuation(3 / 8, 1, 0.01, hard_scores, ROWS),
        head=SCORES,
        labels="scores",
        moment=Moment(step=6, steps=12, epoch_steps=2.5, seed=0),
    ),
    "continuation_kd choices": Case(
        "continuation_kd",
        {"levels": 4},
        continuation(9 / 20, 3 / 4, 1, hard_choices, GROUPS),
        head=CHOICES,
        labels="choices",
        moment=FOURTH_EPOCH,
        zero=False,
    ),
    "continuation_kd tokens": Case(
        "continuation_kd",
        {},
        continuation(9 / 20, 4 / 5, 1, hard_tokens, ROWS),
        head=TOKENS,
        labels="tokens",
        moment=FOURTH_EPOCH,
        zero=False,
    ),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
    ("annealing_kd", {"levels": 2}),
    ("annealing_kd", {"by": "step"}),
    ("continuation_kd", {"margin": 0.5}),
    ("continuation_kd", {"levels": 2}),
    ("continuation_kd", {"by": "step"}),
]

MODELS = [
    ("annealing_kd", {}, "bert", "classification"),
    ("annealing_kd", {"by": "step"}, "bert", "multiple_choice"),
    ("continuation_kd", {}, "llama", "classification"),
    ("continuation_kd", {"by": "step"}, "bert", "token_classification"),
]

LIVE = [("annealing_kd", "class", {}), ("continuation_kd", "class", {"by": "step"})]

RUNS = [("annealing_kd", {"by": "step"}), ("continuation_kd", {"by": "step"})]
