"""PKD: normalised CLS states of inner blocks."""

from collections.abc import Callable

import torch
from case import Case
from given import BERT, LLAMA, SMALL_BERT, SMALL_LLAMA, Given, linear
from torch import Tensor

THREE = SMALL_BERT | dict(layers=3, windows=(None, 2, None))
WIDE = BERT | dict(layers=3, windows=(None,) * 3)


def patience(pairs: list[tuple[int, int]], projected: bool, normalise: bool = True) -> Callable[[Given], dict[str, tuple[Tensor, float]]]:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        total = torch.zeros((), dtype=torch.float64)
        for row in range(5):
            for s, t in pairs:
                mine, theirs = g.S[f"hidden.{s}"][row], g.T[f"hidden.{t}"][row]
                mine = linear(g, "projection", mine) if projected else mine
                if normalise:
                    mine, theirs = mine / (mine * mine).sum().sqrt(), theirs / (theirs * theirs).sum().sqrt()
                total = total + ((mine - theirs) ** 2).sum() / len(theirs)
        return {"patience": (total, 5)}

    return reference


CASES: dict[str, Case] = {
    "pkd skip": Case("pkd", {}, patience([(1, 1), (2, 2)], True), sizes=(THREE, BERT)),
    "pkd last": Case("pkd", {"layers": "last"}, patience([(1, 2), (2, 3)], False), sizes=(WIDE, BERT)),
    "pkd pairs": Case(
        "pkd", {"layers": [[2, 3], [1, 1]], "normalise": False}, patience([(2, 3), (1, 1)], True, False), sizes=(SMALL_LLAMA, LLAMA)
    ),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
    ("pkd skip", {"layers": "last"}),
    ("pkd last", {"layers": [[3, 4]]}),
    ("pkd skip", {"normalise": False}),
]

MODELS = [("pkd", {}, "bert", "classification"), ("pkd", {"layers": "last"}, "llama", "classification")]

LIVE = [("pkd", "class", {}), ("pkd", "causal", {"layers": "last", "normalise": False})]

RUNS = [
    ("pkd", {}),
]
