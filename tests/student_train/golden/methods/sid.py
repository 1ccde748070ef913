"""SID: as many pairs of blocks as are in the sum at a moment, and the soft labels after the last."""

from collections.abc import Callable

import torch
from case import Case
from formulas import maps, together, tokens_term
from given import BERT, CHOICES, CLASSES, GROUPS, LLAMA, ROWS, SAME, TOKENS, Given, Reference, ref_cosine, ref_kl
from torch import Tensor

from student_train.methods.base import Method
from student_train.moment import Moment

NARROW = LLAMA | dict(layers=2, windows=(None, 3))
"""As wide as its teacher."""


def level(inside: int) -> Callable[[Method], None]:
    def set_up(method: Method) -> None:
        method.inside.fill_(inside)

    return set_up


def cls(pairs: list[tuple[int, int]], weight: float = 1) -> Reference:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        total = torch.zeros((), dtype=torch.float64)
        for s, t in pairs:
            for row in range(5):
                total = total + weight * ref_cosine(g.S[f"hidden.{s}"][row], g.T[f"hidden.{t}"][row])
        return {"cosine": (total, 5)}

    return reference


def attention(pairs: list[tuple[int, int]], weight: float = 1) -> Reference:
    return tokens_term("attention", maps(pairs, "attention_scores", ref_kl, weight=weight))


def soft(answers: list[slice | int], temperature: float) -> Reference:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        s, t = g.S["task_logits"], g.T["task_logits"]
        return {"soft": (sum((ref_kl(s[at].flatten(), t[at].flatten(), temperature) for at in answers), torch.zeros(())), len(answers))}

    return reference


LOGITS = frozenset({"task_logits"})
INNER = frozenset({"hidden.1", "hidden.2", "attention_scores.1", "attention_scores.2"})
BERTS = {"sizes": (SAME, BERT), "head": CLASSES}
CASES: dict[str, Case] = {
    "sid": Case(
        "sid",
        {},
        together(attention([(1, 2)]), cls([(1, 2)])),
        moment=Moment(step=3, steps=12, epoch_steps=2, seed=0),
        unread=LOGITS | {"hidden.2", "attention_scores.2"},
        **BERTS,
    ),
    "sid stacked": Case(
        "sid",
        {"attention": 0.5, "cosine": 2, "threshold": 1e-3},
        together(attention([(1, 2), (2, 4)], 0.5), cls([(1, 2), (2, 4)], 2)),
        set_up=level(2),
        unread=LOGITS,
        **BERTS,
    ),
    "sid causal": Case(
        "sid",
        {"layers": [[2, 3], [1, 1]]},
        together(attention([(1, 1), (2, 3)]), cls([(1, 1), (2, 3)])),
        sizes=(NARROW, LLAMA),
        head=CLASSES,
        moment=Moment(step=4, steps=12, epoch_steps=2, seed=0),
        unread=LOGITS,
    ),
    "sid prediction": Case(
        "sid",
        {"temperature": 3},
        soft(ROWS, 3),
        moment=Moment(step=8, steps=12, epoch_steps=2, seed=0),
        unread=INNER,
        **BERTS,
    ),
    "sid choices": Case(
        "sid", {"limit": 2}, soft(GROUPS, 1), sizes=(SAME, BERT), head=CHOICES, labels="choices", set_up=level(3), unread=INNER
    ),
    "sid tokens": Case(
        "sid",
        {"limit": 2},
        together(attention([(1, 2)]), cls([(1, 2)])),
        sizes=(SAME, BERT),
        head=TOKENS,
        labels="tokens",
        moment=Moment(step=11, steps=12, epoch_steps=2, seed=0),
        unread=LOGITS | {"hidden.2", "attention_scores.2"},
    ),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
    ("sid", {"layers": [[1, 1], [2, 2]]}),
    ("sid", {"attention": 0}),
    ("sid", {"cosine": 0}),
    ("sid", {"threshold": 3.0}),
    ("sid", {"limit": 2}),
    ("sid prediction", {"temperature": 1}),
]

MODELS = [("sid", {}, "bert", "classification"), ("sid", {}, "bert", "multiple_choice")]
SAME_WIDTH = [("sid",)]

LIVE = [("sid", "class", {})]

RUNS = [("sid", {}), ("sid", {"threshold": 1.5, "limit": 0.4})]
