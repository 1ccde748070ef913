"""MT-BERT: hidden states and weighted soft labels of several teachers."""

from collections.abc import Callable

import torch
from case import Case
from formulas import hard_choices, hard_classes, hard_tokens, soft_ce
from given import BERT, CHOICES, CLASSES, GROUPS, TOKENS, Given, Reference, ref_ce, ref_mse
from torch import Tensor

SECOND = {"second": BERT | dict(layers=3, width=10, windows=(None,) * 3)}
PAIRS = {"first": [(1, 2), (2, 4)], "second": [(1, 1), (2, 3)]}
LABELLED = [(0, 0), (1, 2), (3, 1), (4, 2)]
CHOSEN: list[tuple[slice | int, int]] = [(GROUPS[0], 1), (GROUPS[1], 2)]
WORDS = [(0, 2), (1, 0), (2, 1), (3, 2), (4, 2)]


def mt_bert(
    hard: Callable[[Given], tuple[Tensor, float]],
    decisions: list[tuple[slice | int, int]] | list[tuple[int, int]],
    pairs: dict[str, list[tuple[int, int]]],
    temperature: float = 1,
    weights: tuple[float, float, float] = (1, 1, 1),
) -> Reference:
    """``decisions``: place and label of those that have one."""

    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        hidden = soft = torch.zeros((), dtype=torch.float64)
        for name in ("first", "second"):
            for s, t in pairs[name]:
                w = g.P[f"maps.{name}-{s}-{t}.weight"]
                for at in g.tokens():
                    hidden = hidden + ref_mse(g.S[f"hidden.{s}"][at], w @ g.T[f"{name}/hidden.{t}"][at])
            for at, label in decisions:
                z_s, z_t = g.S["task_logits"][at].flatten(), g.T[f"{name}/task_logits"][at].flatten()
                soft = soft + soft_ce(temperature)(z_s, z_t) / (1 + ref_ce(z_t, label))
        loss, count = hard(g)
        terms = {"hidden": (weights[0] * hidden, 19), "soft": (weights[1] * soft, count), "hard": (weights[2] * loss, count)}
        return {name: term for (name, term), weight in zip(terms.items(), weights, strict=True) if weight}

    return reference


CASES: dict[str, Case] = {
    "mt_bert classes": Case(
        "mt_bert", {}, mt_bert(hard_classes, LABELLED, PAIRS), head=CLASSES, labels="classes", others=SECOND, zero=False
    ),
    "mt_bert choices": Case(
        "mt_bert",
        {"temperature": 2, "hidden": 0, "soft": 3},
        mt_bert(hard_choices, CHOSEN, {"first": [], "second": []}, 2, (0, 3, 1)),
        head=CHOICES,
        labels="choices",
        others=SECOND,
        zero=False,
    ),
    "mt_bert tokens": Case(
        "mt_bert",
        {"layers": [[0, 0], [2, 1]], "hidden": 2, "hard": 0.5},
        mt_bert(hard_tokens, WORDS, {name: [(0, 0), (2, 1)] for name in PAIRS}, 1, (2, 1, 0.5)),
        head=TOKENS,
        labels="tokens",
        others=SECOND,
        zero=False,
    ),
    "mt_bert hidden states": Case(
        "mt_bert",
        {"layers": "last", "soft": 0, "hard": 0},
        mt_bert(lambda g: (torch.zeros(()), 0), [], {"first": [(2, 4)], "second": [(2, 3)]}, 1, (1, 0, 0)),
        head=CLASSES,
        others=SECOND,
    ),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
    ("mt_bert classes", {"layers": "last"}),
    ("mt_bert classes", {"temperature": 2}),
    ("mt_bert classes", {"hidden": 0}),
    ("mt_bert classes", {"soft": 0}),
    ("mt_bert classes", {"hard": 0}),
]

MODELS = [("mt_bert", {}, "bert", "classification"), ("mt_bert", {"layers": "last"}, "llama", "classification")]

LIVE = [("mt_bert", "class", {}), ("mt_bert", "class", {"layers": [(0, 0), (2, 3)], "temperature": 2.0})]

RUNS = [("mt_bert", {})]
