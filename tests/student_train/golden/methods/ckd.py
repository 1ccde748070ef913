"""CKD: relations of words and of layers, in loops over words, windows and layers."""

from collections.abc import Callable

import torch
from case import Case
from given import BERT, LLAMA, SMALL_LLAMA, Given, Reference, ref_cosine, ref_kl
from torch import Tensor

Layers = list[tuple[int, int]]
Relation = Callable[[list[Tensor], int], Tensor]
ALL: Layers = [(0, 0), (1, 2), (2, 4)]


def cosines(points: list[Tensor], i: int) -> Tensor:
    return torch.stack([1 - ref_cosine(points[i], points[j]) for j in range(len(points)) if j != i])


def angles(points: list[Tensor], i: int) -> Tensor:
    sides = [points[j] - points[i] for j in range(len(points)) if j != i]
    units = [side / (side @ side).sqrt() for side in sides]
    return torch.stack([one @ other for one in units for other in units])


def squares(one: Tensor, other: Tensor) -> Tensor:
    return ((one - other) ** 2).sum()


def words(g: Given, layers: Layers, relation: Relation, distance: Callable[[Tensor, Tensor], Tensor], reach: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for s, t in layers:
        for row, i in g.tokens():
            near = [token for r, token in g.tokens() if r == row and abs(token - i) <= reach]
            if len(near) > 1:
                one, other = (relation([x[row, token] for token in near], near.index(i)) for x in (g.S[f"hidden.{s}"], g.T[f"hidden.{t}"]))
                total = total + distance(one, other)
    return total / len(layers)


def depths(g: Given, layers: Layers, relation: Relation, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row, token in g.tokens():
        one, other = [g.S[f"hidden.{s}"][row, token] for s, _ in layers], [g.T[f"hidden.{t}"][row, token] for _, t in layers]
        for i in range(len(layers)):
            total = total + distance(relation(one, i), relation(other, i))
    return total


def ckd(layers: Layers, weights: tuple[float, float, float, float], reach: int) -> Reference:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        near = [sum(r == row and abs(token - i) <= reach for r, token in g.tokens()) for row, i in g.tokens()]
        terms: dict[str, tuple[Callable[[], Tensor], float]] = {
            "word_pair": (lambda: words(g, layers, cosines, ref_kl, 8), 7**2 + 4**2 + 2**2 + 5**2 + 1),
            "word_triple": (lambda: words(g, layers, angles, squares, reach), sum(number**2 for number in near)),
            "layer_pair": (lambda: depths(g, layers, cosines, ref_kl) / len(layers) ** 2, 19),
            "layer_triple": (lambda: depths(g, layers, angles, squares) / len(layers) ** 3, 19),
        }
        return {term: (weight * total(), count) for (term, (total, count)), weight in zip(terms.items(), weights, strict=True) if weight}

    return reference


CASES: dict[str, Case] = {
    "ckd": Case("ckd", {}, ckd(ALL, (1, 10, 1, 10), 10)),
    "ckd window": Case(
        "ckd",
        {"window": 5, "word_pair": 100, "word_triple": 1000, "layer_pair": 100, "layer_triple": 1000},
        ckd(ALL, (100, 1000, 100, 1000), 2),
        sizes=(SMALL_LLAMA, LLAMA),
    ),
    "ckd words": Case(
        "ckd",
        {"layers": [[2, 3]], "window": 3, "layer_pair": 0, "layer_triple": 0},
        ckd([(2, 3)], (1, 10, 0, 0), 1),
        sizes=(SMALL_LLAMA, BERT),
        zero=False,
    ),
    "ckd layers": Case(
        "ckd",
        {"layers": [[0, 0], [2, 1], [1, 3]], "word_pair": 0, "word_triple": 0, "layer_triple": 0},
        ckd([(0, 0), (2, 1), (1, 3)], (0, 0, 1, 0), 10),
        zero=False,
    ),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
    ("ckd", {"layers": [[0, 0], [1, 1], [2, 4]]}),
    ("ckd", {"word_pair": 0}),
    ("ckd", {"word_triple": 0}),
    ("ckd", {"layer_pair": 0}),
    ("ckd", {"layer_triple": 0}),
    ("ckd", {"window": 3}),
]

MODELS = [("ckd", {}, "bert", "classification"), ("ckd", {"window": 3}, "llama", "causal_lm")]

LIVE = [("ckd", "mlm", {}), ("ckd", "class", {"layer_pair": 0, "layer_triple": 0}), ("ckd", "packed", {"window": 5})]

RUNS = [
    ("ckd", {}),
]
