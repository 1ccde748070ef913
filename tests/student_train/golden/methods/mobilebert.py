"""MobileBERT: the gaps of one pair of blocks at a moment, token by token."""

import math

import torch
from case import Case
from formulas import maps, together, tokens_term
from given import BERT, LLAMA, SAME, Given, Reference, ref_kl
from torch import Tensor

from student_train.moment import Moment

NARROW = LLAMA | dict(layers=2, windows=(None, 3))
"""As wide as its teacher."""


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = sum(x) / len(x)
    return mean, sum((value - mean) ** 2 for value in x) / len(x)


def gaps(pair: tuple[int, int], weights: tuple[float, float, float], normalise: bool = True) -> Reference:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        totals = dict.fromkeys(("hidden", "mean", "variance"), torch.zeros((), dtype=torch.float64))
        for at in g.tokens():
            s, t = g.S[f"hidden.{pair[0]}"][at], g.T[f"hidden.{pair[1]}"][at]
            (mean, variance), (true_mean, true_variance) = moments(s), moments(t)
            if normalise:
                s, t = (s - mean) / (variance + 1e-12).sqrt(), (t - true_mean) / math.sqrt(true_variance + 1e-12)
            totals["hidden"] = totals["hidden"] + weights[0] * sum((s - t) ** 2) / len(s)
            totals["mean"] = totals["mean"] + weights[1] * (mean - true_mean) ** 2
            totals["variance"] = totals["variance"] + weights[2] * (variance - true_variance).abs()
        return {name: (totals[name], 19) for name, weight in zip(totals, weights, strict=True) if weight}

    return reference


def attention(pair: tuple[int, int], weight: float = 1) -> Reference:
    return tokens_term("attention", maps([pair], "attention_scores", ref_kl, weight=weight))


def at(step: int, steps: int = 12) -> Moment:
    return Moment(step=step, steps=steps, epoch_steps=2.0, seed=0)


FIRST, SECOND = (frozenset({f"hidden.{block}", f"attention_scores.{block}"}) for block in (1, 2))
CASES: dict[str, Case] = {
    "mobilebert": Case(
        "mobilebert", {}, together(gaps((1, 2), (100, 5000, 5)), attention((1, 2))), sizes=(SAME, BERT), moment=at(5), unread=SECOND
    ),
    "mobilebert second": Case(
        "mobilebert",
        {"hidden": 2, "mean": 3, "variance": 0.5, "attention": 4},
        together(gaps((2, 4), (2, 3, 0.5)), attention((2, 4), 4)),
        sizes=(SAME, BERT),
        moment=at(6),
        unread=FIRST,
    ),
    "mobilebert third": Case(
        "mobilebert", {}, together(gaps((2, 4), (100, 5000, 5)), attention((2, 4))), sizes=(SAME, BERT), moment=at(8), unread=FIRST
    ),
    "mobilebert plain": Case(
        "mobilebert",
        {"layers": [[2, 3], [1, 1]], "normalise": False, "hidden": 1, "mean": 0, "variance": 0},
        together(gaps((2, 3), (1, 0, 0), False), attention((2, 3))),
        sizes=(NARROW, LLAMA),
        moment=at(11),
        unread=FIRST,
    ),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
    ("mobilebert", {"layers": "last"}),
    ("mobilebert", {"hidden": 0}),
    ("mobilebert", {"mean": 0}),
    ("mobilebert", {"variance": 0}),
    ("mobilebert", {"attention": 0}),
    ("mobilebert", {"normalise": False}),
    ("mobilebert", {"rate": 1.0}),
    ("mobilebert third", {"earlier": 0.2}),
    ("mobilebert", {"rise": 0.9}),
    ("mobilebert", {"fall": 0.5}),
]

# What a fresh BERT's layer norms give has variance 1 in every model, and the sign of a gap of rounding errors is chance.
MODELS = [
    ("mobilebert", {"variance": 0, "mean": 1, "hidden": 1}, "bert", "masked_lm"),
    ("mobilebert", {"layers": "last", "mean": 1, "hidden": 1}, "llama", "causal_lm"),
]
SAME_WIDTH = [("mobilebert",)]

LIVE = [("mobilebert", "mlm", {}), ("mobilebert", "packed", {"layers": [[1, 3]], "mean": 1.0})]

RUNS = [("mobilebert", {"rise": 0.5})]
