"""Meta-KD: losses of rows, weighed by the teacher's probability of their class and by how typical they are."""

import math

import torch
from case import Case
from formulas import kl_at
from given import CLASSES, LAST, LLAMA, SAME, SMALL_LLAMA, UNIFORM, Given, Reference, linear, ref_cosine, ref_mse
from torch import Tensor

from student_train.methods.base import Method

LABELLED = [(0, 0, 0), (1, 2, 2), (3, 0, 1), (4, 2, 2)]
"""Row, domain and class."""


def seen_before(method: Method) -> None:
    """Rows of every domain and class but two."""
    generator = torch.Generator().manual_seed(8)
    sums, seen = method.get_buffer("sums"), method.get_buffer("seen")
    sums.copy_(torch.randn(sums.shape, generator=generator) * 3)
    seen.copy_(torch.randint(1, 5, seen.shape, generator=generator))
    for domain, label in ((0, 0), (1, 1)):
        sums[domain, label], seen[domain, label] = 0, 0


def seen_nothing(method: Method) -> None:
    pass


def trust(g: Given, row: int, domain: int, label: int, own: float) -> float:
    """lambda."""
    z = g.T["task_logits"][row]
    p = math.exp(z[label]) / sum(math.exp(x) for x in z)
    x, sums, seen = g.T["final"][row], g.P["sums"], g.P["seen"]
    near = {d: 1 - float(ref_cosine(x, sums[d, label] / seen[d, label])) for d in range(len(seen)) if seen[d, label] > 0}
    others = [value for d, value in near.items() if d != domain]
    t = own * near.get(domain, 0.0) + (1 - own) * (sum(others) / len(others) if others else 0.0)
    return (1 + t) / (1 + math.exp((1 - p) ** 2))


def meta_kd(
    pairs: list[tuple[int, int]], own: float = 0.5, temperature: float = 1, weights: tuple[float, float, float, float] = (1, 1, 1, 1)
) -> Reference:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        names = ("embedding", "hidden", "attention", "soft")
        total = {name: torch.zeros((), dtype=torch.float64) for name in names}
        for row, domain, label in LABELLED:
            scale = trust(g, row, domain, label, own)
            tokens = [at for at in g.tokens() if at[0] == row]
            if weights[0]:
                losses = [ref_mse(linear(g, "embedding_projection", g.S["hidden.0"][at]), g.T["hidden.0"][at]) for at in tokens]
                total["embedding"] = total["embedding"] + scale * sum(losses) / len(tokens)
            for s, t in pairs:
                if weights[1]:
                    losses = [ref_mse(linear(g, "hidden_projection", g.S[f"hidden.{s}"][at]), g.T[f"hidden.{t}"][at]) for at in tokens]
                    total["hidden"] = total["hidden"] + scale * sum(losses) / len(tokens)
                if weights[2]:
                    a, b = g.S[f"attention_scores.{s}"][row], g.T[f"attention_scores.{t}"][row]
                    squares = [
                        (a[head, query, key] - b[head, query, key]) ** 2
                        for of_row, query, keys in g.rows_of_scores((s, t))
                        if of_row == row
                        for key in keys
                        for head in range(len(a))
                    ]
                    total["attention"] = total["attention"] + scale * sum(squares) / len(squares)
            if weights[3]:
                total["soft"] = total["soft"] + scale * kl_at(temperature)(g.S["task_logits"][row], g.T["task_logits"][row])
        return {name: (weight * total[name], 4) for name, weight in zip(names, weights, strict=True) if weight}

    return reference


CASES: dict[str, Case] = {
    "meta_kd": Case("meta_kd", {"domains": 3}, meta_kd(UNIFORM), head=CLASSES, labels="classes", set_up=seen_before),
    "meta_kd weights": Case(
        "meta_kd",
        {"domains": 4, "own": 0.8, "layers": "last", "temperature": 2, "embedding": 2, "hidden": 3, "attention": 0.5, "soft": 4},
        meta_kd(LAST, 0.8, 2, (2, 3, 0.5, 4)),
        head=CLASSES,
        sizes=(SAME, LLAMA | {"heads": 4, "kv_heads": 4}),
        labels="classes",
        set_up=seen_before,
    ),
    "meta_kd hidden states": Case(
        "meta_kd",
        {"domains": 3, "embedding": 0, "attention": 0, "soft": 0},
        meta_kd(UNIFORM, weights=(0, 1, 0, 0)),
        head=CLASSES,
        sizes=(SMALL_LLAMA, LLAMA),
        labels="classes",
        set_up=seen_before,
    ),
    "meta_kd at first": Case(
        "meta_kd",
        {"domains": 3, "hidden": 0, "attention": 0},
        meta_kd([], weights=(1, 0, 0, 1)),
        head=CLASSES,
        labels="classes",
        set_up=seen_nothing,
    ),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
    ("meta_kd", {"domains": 4}),
    ("meta_kd", {"own": 0}),
    ("meta_kd", {"layers": "last"}),
    ("meta_kd", {"temperature": 2}),
    ("meta_kd", {"embedding": 0}),
    ("meta_kd", {"hidden": 0}),
    ("meta_kd", {"attention": 0}),
    ("meta_kd", {"soft": 0}),
]

MODELS = [
    ("meta_kd", {"domains": 3}, "bert", "classification"),
    ("meta_kd", {"domains": 3, "layers": "last"}, "llama", "classification"),
]

LIVE = [("meta_kd", "class", {"domains": 3}), ("meta_kd", "class", {"domains": 3, "own": 1.0, "layers": [(2, 3)], "soft": 0})]
