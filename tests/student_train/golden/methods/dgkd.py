"""DGKD: several teachers at once, some of them dropped."""

from collections.abc import Callable

import torch
from case import Case
from formulas import hard_choices, hard_classes, hard_scores, hard_tokens, kl_at, score_mse
from given import BERT, CHOICES, CLASSES, GROUPS, ROWS, SCORES, TOKENS, Given, Reference
from torch import Tensor

from student_train.moment import Moment

SECOND, THIRD = BERT | dict(layers=3, width=10, windows=(None,) * 3), BERT | dict(layers=2, windows=(None,) * 2)
TWO, THREE = {"second": SECOND}, {"second": SECOND, "third": THIRD}


def dgkd(
    hard: Callable[[Given], tuple[Tensor, float]],
    soft: Callable[[Tensor, Tensor], Tensor],
    decisions: list[slice | int],
    names: list[str],
    alpha: float = 0.5,
    divided: float = 1,
) -> Reference:
    """``names``: those that survive."""

    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        total = torch.zeros((), dtype=torch.float64)
        for name in names:
            for at in decisions:
                total = total + soft(g.S["task_logits"][at].flatten(), g.T[f"{name}/task_logits"][at].flatten())
        loss, count = hard(g)
        return {"soft": (alpha * total / divided, len(decisions)), "hard": ((1 - alpha) * loss, count)}

    return reference


BOTH = ["first", "second"]

CASES: dict[str, Case] = {
    "dgkd classes": Case(
        "dgkd",
        {"survival": 1, "alpha": 0.7, "temperature": 3},
        dgkd(hard_classes, kl_at(3), ROWS, BOTH, 0.7),
        head=CLASSES,
        labels="classes",
        others=TWO,
    ),
    "dgkd scores": Case("dgkd", {"survival": 1}, dgkd(hard_scores, score_mse, ROWS, BOTH), head=SCORES, labels="scores", others=TWO),
    "dgkd choices": Case("dgkd", {"survival": 1}, dgkd(hard_choices, kl_at(5), GROUPS, BOTH), head=CHOICES, labels="choices", others=TWO),
    "dgkd tokens": Case("dgkd", {"survival": 1}, dgkd(hard_tokens, kl_at(5), ROWS, BOTH), head=TOKENS, labels="tokens", others=TWO),
    "dgkd survivors": Case(
        "dgkd",
        {},
        dgkd(hard_classes, kl_at(5), ROWS, ["second", "third"]),
        head=CLASSES,
        labels="classes",
        others=THREE,
        moment=Moment(step=8, steps=100, epoch_steps=10.0, seed=3),
    ),
    "dgkd one dropped": Case(
        "dgkd",
        {"drop": 1},
        dgkd(hard_classes, kl_at(5), ROWS, ["first", "third"]),
        head=CLASSES,
        labels="classes",
        others=THREE,
        moment=Moment(step=4, steps=100, epoch_steps=10.0, seed=3),
    ),
    "dgkd mean of survivors": Case(
        "dgkd",
        {"drop": 1, "combine": "mean"},
        dgkd(hard_classes, kl_at(5), ROWS, ["first", "third"], divided=2),
        head=CLASSES,
        labels="classes",
        others=THREE,
        moment=Moment(step=4, steps=100, epoch_steps=10.0, seed=3),
    ),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
    ("dgkd classes", {"alpha": 0.2}),
    ("dgkd classes", {"temperature": 1}),
    ("dgkd classes", {"survival": 0.001}),
    ("dgkd classes", {"drop": 1}),
    ("dgkd classes", {"combine": "mean"}),
]

MODELS = [("dgkd", {"survival": 1.0}, "bert", "classification"), ("dgkd", {"survival": 1.0}, "bert", "multiple_choice")]

LIVE = [("dgkd", "class", {"survival": 1.0}), ("dgkd", "class", {"survival": 1.0, "alpha": 1.0})]

RUNS = [("dgkd", {}), ("dgkd", {"drop": 1})]
