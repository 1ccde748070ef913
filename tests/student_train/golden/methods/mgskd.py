"""MGSKD: pairs and triplets of tokens, phrases and rows, in loops over heads and points."""

import math

import torch
from case import Case
from given import BERT, LLAMA, SAME, SMALL_LLAMA, Given, Reference, linear
from torch import Tensor

Layers = list[tuple[int, int]]


def huber(one: Tensor, other: Tensor) -> Tensor:
    gap = (one - other).abs()
    return torch.where(gap < 1, gap * gap / 2, gap - 0.5)


def cosine_at(x: Tensor, i: int, j: int, k: int) -> Tensor:
    one, other = x[j] - x[i], x[k] - x[i]
    return one @ other / ((one @ one).sqrt() * (other @ other).sqrt())


def structure(s: Tensor, t: Tensor, heads: int, most: tuple[int, int]) -> tuple[Tensor, int, Tensor, int]:
    """Sum over pairs, their number, sum over points of the mean over triplets, and the number of those points; of the points of one row."""
    points, zero = len(s), torch.zeros((), dtype=torch.float64)
    of_heads = list(zip(s.chunk(heads, 1), t.chunk(heads, 1), strict=True))
    pair, weights = zero, torch.zeros(points, points, dtype=torch.float64)
    for one, other in of_heads:
        scores = [x @ x.T / math.sqrt(x.shape[1]) for x in (one, other)]
        pair = pair + ((scores[0] - scores[1]) ** 2).sum() / heads
        weights = weights + torch.softmax(scores[1], 1)
    triple, corners = zero, 0
    if points > 2:
        chosen = sorted(range(points), key=lambda i: -float(weights[:, i].sum()))[: most[0]]
        for i in chosen:
            around = sorted((j for j in range(points) if j != i), key=lambda j: -float(weights[i, j]))[: most[1]]
            sides = [(j, k) for j in around for k in around if j != k]
            found = [huber(cosine_at(one, i, j, k), cosine_at(other, i, j, k)) for j, k in sides for one, other in of_heads]
            triple = triple + sum(found) / (len(sides) * heads)
        corners = len(chosen)
    return pair, points**2, triple, corners


def rows_term(s: Tensor, t: Tensor, heads: int) -> Tensor:
    triplets = [(i, j, k) for i in range(5) for j in range(5) for k in range(5) if len({i, j, k}) == 3]
    of_heads = list(zip(s.chunk(heads, 1), t.chunk(heads, 1), strict=True))
    return sum(huber(cosine_at(one, *at), cosine_at(other, *at)) for at in triplets for one, other in of_heads) / (12 * heads)


def phrases_of(x: Tensor, numbers: list[int]) -> Tensor:
    found = [
        torch.stack([x[n] for n, number in enumerate(numbers) if number == phrase]) for phrase in range(1, max(numbers, default=0) + 1)
    ]
    return torch.stack([tokens.mean(0) for tokens in found]) if found else x[:0]


def mgskd(
    lower: Layers, upper: Layers, heads: int, most: tuple[int, int], weights: tuple[float, float, float], projected: bool
) -> Reference:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        def student(x: Tensor) -> Tensor:
            return torch.stack([linear(g, "projection", one) for one in x]) if projected and len(x) else x

        terms = {}
        for name, weight in (("token", weights[0]), ("phrase", weights[1])):
            if not weight:
                continue
            pair, triple, pairs, corners = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0, 0
            for s, t in lower:
                for row in range(5):
                    at = [token for r, token in g.tokens() if r == row]
                    one, other = student(g.S[f"hidden.{s}"][row, at]), g.T[f"hidden.{t}"][row, at]
                    if name == "phrase":
                        assert g.batch.phrases is not None
                        numbers = g.batch.phrases[row, at].tolist()
                        one, other = phrases_of(one, numbers), phrases_of(other, numbers)
                    found = structure(one, other, heads, most)
                    pair, pairs, triple, corners = pair + found[0], pairs + found[1], triple + found[2], corners + found[3]
            terms[f"{name}_pair"] = (weight * pair, pairs / len(lower))
            terms[f"{name}_triple"] = (weight * triple, corners / len(lower))
        if weights[2]:
            total = sum(rows_term(student(g.S[f"hidden.{s}"]), g.T[f"hidden.{t}"], heads) for s, t in upper)
            terms["sample"] = (weights[2] * total, 5)
        return terms

    return reference


SAMPLE = frozenset({"sample"})
CASES: dict[str, Case] = {
    "mgskd": Case("mgskd", {"heads": 3}, mgskd([(0, 0), (1, 2)], [(2, 4)], 3, (20, 20), (1, 1, 4), True), labels="phrases", coupled=SAMPLE),
    "mgskd few points": Case(
        "mgskd",
        {"heads": 2, "global_points": 2, "local_points": 3, "token_layers": 3, "token": 0.5, "phrase": 0.25, "sample": 0},
        mgskd([(0, 0), (1, 2), (2, 4)], [], 2, (2, 3), (0.5, 0.25, 0), True),
        sizes=(SMALL_LLAMA, LLAMA),
        labels="phrases",
    ),
    "mgskd rows": Case(
        "mgskd",
        {"layers": [[1, 1], [2, 3]], "token_layers": 0, "token": 0, "phrase": 0, "heads": 4},
        mgskd([], [(1, 1), (2, 3)], 4, (20, 20), (0, 0, 4), False),
        sizes=(SAME, BERT),
        coupled=SAMPLE,
    ),
    "mgskd tokens": Case(
        "mgskd",
        {"phrase": 0, "token_layers": 1, "heads": 6},
        mgskd([(0, 0)], [(1, 2), (2, 4)], 6, (20, 20), (1, 0, 4), True),
        coupled=SAMPLE,
    ),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
    ("mgskd", {"layers": [[0, 0], [1, 1], [2, 4]]}),
    ("mgskd", {"token_layers": 1}),
    ("mgskd", {"heads": 2}),
    ("mgskd", {"global_points": 3}),
    ("mgskd", {"local_points": 2}),
    ("mgskd", {"token": 0}),
    ("mgskd", {"phrase": 0}),
    ("mgskd", {"sample": 0}),
]

MODELS = [("mgskd", {"phrase": 0, "heads": 6}, "bert", "classification"), ("mgskd", {"phrase": 0, "heads": 4}, "llama", "causal_lm")]

LIVE = [
    ("mgskd", "class", {"phrase": 0, "heads": 4}),
    ("mgskd", "mlm", {"phrase": 0, "heads": 4, "local_points": 4}),
    ("mgskd", "packed", {"phrase": 0, "sample": 0, "heads": 8}),
]

RUNS = [("mgskd", {"heads": 4, "token_layers": 1})]
