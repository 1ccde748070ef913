"""Marginal utility: which tokens and neurons are compared, chosen in loops."""

import torch
from case import Case
from given import BERT, CLM, LLAMA, PAIRS, SAME, SMALL_BERT, SMALL_LLAMA, UNIFORM, Given, Reference, linear
from torch import Tensor

Layers = list[tuple[int, int]]


def even(width: int, kept: int) -> list[int]:
    return [int(number * width / kept) for number in range(kept)]


def largest(x: Tensor, kept: int) -> list[int]:
    return sorted(range(len(x)), key=lambda n: -abs(float(x[n])))[:kept]


def left(pairs: Layers, tokens: int, kept: int) -> Reference:
    """Student vectors [8 or 12] and teacher vectors [kept] of the leftmost tokens."""

    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        total, count = torch.zeros((), dtype=torch.float64), 0
        lengths = [7, 4, 2, 5, 1]
        for s, t in pairs:
            for row in range(5):
                for place in range(min(tokens, lengths[row])):
                    mine, theirs = linear(g, "projection", g.S[f"hidden.{s}"][row, place]), g.T[f"hidden.{t}"][row, place]
                    chosen = even(g.teacher.width, kept)
                    total = total + sum((mine[n] - theirs[i]) ** 2 for i, n in enumerate(chosen)) / kept
                    count += 1
        return {"hidden": (total, count / len(pairs))}

    return reference


def everywhere(pairs: Layers, projected: bool, kept: int, magnitude: bool = False, attended: int = 0) -> Reference:
    """Vectors of all tokens, of which ``attended`` are chosen in each row (0: all)."""

    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        total, count = torch.zeros((), dtype=torch.float64), 0
        for s, t in pairs:
            for row in range(5):
                places = [token for r, token in g.tokens() if r == row]
                asking = places[-1] if g.teacher.causal else places[0]
                if attended:
                    scores = g.T[f"attention_scores.{max(1, t)}"][row, :, asking, places]
                    weight = torch.softmax(scores, 1).mean(0).tolist()
                    places = sorted(places, key=lambda token: -weight[places.index(token)])[:attended]
                for place in places:
                    mine, theirs = g.S[f"hidden.{s}"][row, place], g.T[f"hidden.{t}"][row, place]
                    mine = linear(g, "projection", mine) if projected else mine
                    chosen = {n: n for n in largest(theirs, kept)} if magnitude else dict(enumerate(even(len(mine), kept)))
                    total = total + sum((mine[n] - theirs[i]) ** 2 for i, n in chosen.items()) / kept
                    count += 1
        return {"hidden": (total, count / len(pairs))}

    return reference


CASES: dict[str, Case] = {
    "marginal_utility": Case("marginal_utility", {"tokens": 3, "width": 0.25}, left([(2, 4)], 3, 3), sizes=(SMALL_BERT, BERT)),
    "marginal_utility long": Case(
        "marginal_utility", {"tokens": 20, "width": 0.4, "layers": "uniform"}, left(UNIFORM, 20, 5), sizes=(SMALL_BERT, BERT)
    ),
    "marginal_utility all": Case(
        "marginal_utility", {"tokens": None, "width": 1.0, "layers": [[0, 0]]}, everywhere([(0, 0)], False, 12), sizes=(SAME, BERT)
    ),
    "marginal_utility even": Case(
        "marginal_utility", {"tokens": None, "width": 0.5, "layers": PAIRS}, everywhere([(2, 3), (1, 1)], False, 6), sizes=(SAME, BERT)
    ),
    "marginal_utility chosen": Case(
        "marginal_utility",
        {"tokens": 3, "tokens_by": "attention", "width": 0.3, "width_by": "magnitude", "layers": [[0, 0], [2, 3]]},
        everywhere([(0, 0), (2, 3)], True, 4, True, 3),
        sizes=(SMALL_BERT, BERT),
    ),
    "marginal_utility causal": Case(
        "marginal_utility",
        {"tokens": 2, "tokens_by": "attention", "width": 0.2},
        everywhere([(2, 4)], True, 2, False, 2),
        sizes=(SMALL_LLAMA, LLAMA),
        head=CLM,
    ),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
    ("marginal_utility", {"layers": [[1, 4]]}),
    ("marginal_utility", {"tokens": 2}),
    ("marginal_utility", {"tokens_by": "attention"}),
    ("marginal_utility", {"width": 0.5}),
    ("marginal_utility", {"width_by": "magnitude"}),
]

MODELS = [("marginal_utility", {"tokens": 4, "width": 0.5}, "bert", "classification"), ("marginal_utility", {}, "llama", "causal_lm")]

LIVE = [
    ("marginal_utility", "class", {"width": 0.25}),
    ("marginal_utility", "modern", {"tokens": 20, "layers": "uniform"}),
    ("marginal_utility", "mlm", {"tokens": None, "width": 0.5}),
    ("marginal_utility", "causal", {"tokens": 5, "tokens_by": "attention", "width_by": "magnitude"}),
    ("marginal_utility", "packed", {"tokens": 8, "layers": [[2, 3]]}),
]

RUNS = [
    ("marginal_utility", {}),
]
