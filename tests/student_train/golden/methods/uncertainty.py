"""Dynamic KD: who teaches which rows what follows the student's uncertainty."""

import math
from collections.abc import Callable

import torch
from case import Case
from formulas import hard_choices, hard_classes, hard_tokens, kl_at
from given import BERT, CHOICES, CLASSES, GROUPS, ROWS, TOKENS, Given, Reference, ref_mse
from torch import Tensor

STUDENT = BERT | dict(layers=2, windows=(None, 2))
SECOND = BERT | dict(layers=3, windows=(None,) * 3)
TWO, THREE = {"second": SECOND}, {"second": SECOND, "third": BERT}
PAIRS = {"first": [(1, 2), (2, 4)], "second": [(1, 1), (2, 3)]}
Select = Callable[[list[Tensor]], list[int]]
"""Probabilities of each decision -> the places of those that are chosen."""


def entropy(p: Tensor) -> float:
    return -sum(x * math.log(x) for x in p.tolist()) / math.log(len(p))


def likeliest(p: Tensor, place: int) -> float:
    return sorted(p.tolist(), reverse=True)[place]


def most(unsure: Callable[[Tensor], float], number: int) -> Select:
    return lambda ps: sorted(range(len(ps)), key=lambda at: -unsure(ps[at]))[:number]


def everything(ps: list[Tensor]) -> list[int]:
    return list(range(len(ps)))


def hard_shares(us: list[float], chosen: list[int], teachers: int) -> dict[int, list[float]]:
    """The most uncertain first: place -> weights of the teachers, whose groups' means are added."""
    order = sorted(chosen, key=lambda at: -us[at])
    bounds = [len(order) * group // teachers for group in range(teachers + 1)]
    shares = {}
    for group in range(teachers):
        members = order[bounds[group] : bounds[group + 1]]
        for at in members:
            shares[at] = [len(us) / len(members) if group == other else 0.0 for other in range(teachers)]
    return shares


def soft_shares(us: list[float], chosen: list[int], teachers: int, by_row: bool) -> dict[int, list[float]]:
    shares = {}
    for at in chosen:
        u = us[at] if by_row else sum(us) / len(us)
        raw = [u if i == 0 else 1 - u if i == teachers - 1 else 0.5 for i in range(teachers)]  # three: the middle one
        shares[at] = [weight / sum(raw) * len(us) / len(chosen) for weight in raw]
    return shares


Shares = Callable[[list[float], list[int], int], dict[int, list[float]]]


def by_row(us: list[float], chosen: list[int], teachers: int) -> dict[int, list[float]]:
    return soft_shares(us, chosen, teachers, True)


def by_batch(us: list[float], chosen: list[int], teachers: int) -> dict[int, list[float]]:
    return soft_shares(us, chosen, teachers, False)


def dynamic(
    hard: Callable[[Given], tuple[Tensor, float]],
    distance: Callable[[Tensor, Tensor], Tensor],
    decisions: list[slice | int],
    names: list[str],
    shares_of: Shares,
    select: Select = everything,
    weights: tuple[float, float, float] = (1, 0, 1),
) -> Reference:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        scores = [g.S["task_logits"][at].flatten() for at in decisions]
        ps = [torch.softmax(z.detach(), 0) for z in scores]
        us = [entropy(p) for p in ps]
        soft = hidden = torch.zeros((), dtype=torch.float64)
        for place, shares in shares_of(us, select(ps), len(names)).items():
            for name, share in zip(names, shares, strict=True):
                logits = 1 - us[place] if weights[1] else 1
                soft = soft + share * logits * distance(scores[place], g.T[f"{name}/task_logits"][decisions[place]].flatten())
                if weights[1]:
                    hidden = hidden + share * us[place] * row_of_states(g, place, name)
        loss, count = hard(g)
        terms = {
            "soft": (weights[0] * soft, len(decisions)),
            "hidden": (weights[1] * hidden, len(decisions)),
            "hard": (weights[2] * loss, count),
        }
        return {name: term for (name, term), weight in zip(terms.items(), weights, strict=True) if weight}

    return reference


def row_of_states(g: Given, row: int, name: str) -> Tensor:
    tokens = [at for at in g.tokens() if at[0] == row]
    total = torch.zeros((), dtype=torch.float64)
    for s, t in PAIRS[name]:
        for at in tokens:
            of_student, of_teacher = g.S[f"hidden.{s}"][at], g.T[f"{name}/hidden.{t}"][at]
            total = total + ref_mse(of_student / (of_student @ of_student).sqrt(), of_teacher / (of_teacher @ of_teacher).sqrt())
    return total / len(tokens)


def case(
    options: dict[str, object],
    reference: Reference,
    head: tuple[str, int] = CLASSES,
    labels: str = "classes",
    others: dict[str, dict[str, object]] = TWO,
    coupled: frozenset[str] = frozenset({"soft"}),
) -> Case:
    return Case("uncertainty", options, reference, head, (STUDENT, BERT), labels, others, coupled=coupled)


BOTH, ALL = ["first", "second"], ["first", "second", "third"]

CASES: dict[str, Case] = {
    "uncertainty hard": case({}, dynamic(hard_classes, ref_mse, ROWS, BOTH, hard_shares)),
    "uncertainty hard, three": case({}, dynamic(hard_classes, ref_mse, ROWS, ALL, hard_shares), others=THREE),
    "uncertainty choices": case(
        {"distance": "kl"}, dynamic(hard_choices, kl_at(5), GROUPS, BOTH, hard_shares), head=CHOICES, labels="choices"
    ),
    "uncertainty choices, scores": case(
        {"adoption": "soft"}, dynamic(hard_choices, ref_mse, GROUPS, BOTH, by_batch), head=CHOICES, labels="choices"
    ),
    "uncertainty tokens": case({}, dynamic(hard_tokens, ref_mse, ROWS, BOTH, hard_shares), head=TOKENS, labels="tokens"),
    "uncertainty soft": case(
        {"adoption": "soft", "distance": "kl", "temperature": 2, "soft": 3, "hard": 0.5},
        dynamic(hard_classes, kl_at(2), ROWS, BOTH, by_batch, weights=(3, 0, 0.5)),
    ),
    "uncertainty soft rows": case(
        {"adoption": "soft_rows"}, dynamic(hard_classes, ref_mse, ROWS, ALL, by_row), others=THREE, coupled=frozenset()
    ),
    "uncertainty one teacher": case(
        {"adoption": "soft", "fraction": 0.4, "hard": 0},
        dynamic(
            hard_classes,
            ref_mse,
            ROWS,
            ["first"],
            lambda us, chosen, _: {at: [len(us) / len(chosen)] for at in chosen},
            most(entropy, 2),
            (1, 0, 0),
        ),
        others={},
    ),
    "uncertainty margin": case(
        {"fraction": 0.6, "by": "margin"},
        dynamic(hard_classes, ref_mse, ROWS, BOTH, hard_shares, most(lambda p: likeliest(p, 1) - likeliest(p, 0), 3)),
    ),
    "uncertainty confidence": case(
        {"fraction": 0.4, "by": "confidence", "adoption": "soft_rows"},
        dynamic(hard_classes, ref_mse, ROWS, BOTH, by_row, most(lambda p: -likeliest(p, 0), 2)),
    ),
    "uncertainty hidden": case(
        {"hidden": 2, "adoption": "soft_rows"},
        dynamic(hard_classes, ref_mse, ROWS, BOTH, by_row, weights=(1, 2, 1)),
        coupled=frozenset(),
    ),
    "uncertainty hidden of chosen rows": case(
        {"hidden": 1, "fraction": 0.8},
        dynamic(hard_classes, ref_mse, ROWS, BOTH, hard_shares, most(entropy, 4), (1, 1, 1)),
        coupled=frozenset({"soft", "hidden"}),
    ),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
    ("uncertainty hard", {"adoption": "soft"}),
    ("uncertainty soft", {"adoption": "soft_rows"}),
    ("uncertainty hard", {"fraction": 0.4}),
    ("uncertainty margin", {"by": "entropy"}),
    ("uncertainty hard", {"distance": "kl"}),
    ("uncertainty choices", {"temperature": 1}),
    ("uncertainty hidden", {"layers": "last"}),
    ("uncertainty hidden", {"soft": 0}),
    ("uncertainty hidden", {"hidden": 0}),
    ("uncertainty hard", {"hard": 0}),
]

MODELS = [
    ("uncertainty", {"adoption": "soft_rows"}, "bert", "classification"),
    ("uncertainty", {"distance": "kl"}, "llama", "classification"),
    ("uncertainty", {"adoption": "soft"}, "bert", "multiple_choice"),
]

LIVE = [
    ("uncertainty", "class", {}),
    ("uncertainty", "class", {"adoption": "soft", "distance": "kl", "hidden": 1.0}),
    ("uncertainty", "class", {"adoption": "soft_rows", "fraction": 0.5, "by": "margin"}),
]

RUNS = [
    ("uncertainty", {}),
    ("uncertainty", {"adoption": "soft", "distance": "kl"}),
    ("uncertainty", {"fraction": 0.5, "by": "confidence"}),
]
