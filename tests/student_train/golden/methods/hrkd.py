"""HRKD: losses of rows, times the ratio that a graph of the domains gives each layer and domain."""

import torch
from case import Case
from given import BERT, LLAMA, SAME, SMALL_BERT, SMALL_LLAMA, UNIFORM, Given, Reference, linear, ref_mse
from torch import Tensor

from student_train.methods.base import Method

MEMBERS = {0: [0, 3], 2: [1, 2, 4]}
"""Domain -> its rows; 1 has none."""


def milder(method: Method) -> None:
    """Products of random states are large, and softmaxes of them steep: float32 would not follow."""
    with torch.no_grad():
        for name in ("across", "along", "map"):
            method.get_parameter(f"graph.{name}").mul_(0.3)


def at_the_bend(method: Method) -> None:
    """Scores of attention that differ in sign, so that domains gather different things."""
    milder(method)
    with torch.no_grad():
        for name in ("attend", "out_attend"):
            here, there = method.get_parameter(f"graph.{name}").chunk(2, -2)
            here.copy_(-0.7 * there)
        method.get_parameter("graph.out_map").abs_().mul_(3)


def elu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, x.exp() - 1)


def attended(states: dict[int, Tensor], maps: Tensor, scores: Tensor, published: bool) -> dict[int, Tensor]:
    """A layer of graph attention: every domain looks at all, and keeps its own value."""
    found: dict[int, list[Tensor]] = {d: [] for d in states}
    for w, a in zip(maps, scores, strict=True):
        values = {d: x @ w for d, x in states.items()}
        for d in states:
            raw = {other: (torch.cat([values[d], values[other]]) @ a).squeeze() for other in states}
            raw = {other: e if e > 0 else 0.2 * e for other, e in raw.items()}
            total = sum(e.exp() for e in raw.values())
            mixed = sum(e.exp() / total * values[other] for other, e in raw.items())
            found[d].append(mixed if published else mixed + values[d])
    return {d: torch.cat(parts) for d, parts in found.items()}


def ratios(g: Given, states: list[dict[int, Tensor]], published: bool) -> list[dict[int, Tensor]]:
    """Of each layer and domain."""
    p, result = {name.removeprefix("graph."): value for name, value in g.P.items()}, []
    for layer, own in enumerate(states):
        seen = own
        if layer:
            seen = {}
            for d, x in own.items():
                near = {other: x @ p["across"][layer - 1] @ y for other, y in own.items()}
                total = sum(e.exp() for e in near.values())
                reference = sum(e.exp() / total * own[other] for other, e in near.items())
                depth = [states[below][d] @ p["along"][layer - 1, d] @ reference for below in range(layer + 1)]
                total = sum(e.exp() for e in depth)
                seen[d] = sum(e.exp() / total * states[below][d] for below, e in enumerate(depth))
        inner = {d: elu(x) for d, x in attended(seen, p["map"][layer], p["attend"][layer], published).items()}
        outer = attended(inner, p["out_map"][layer], p["out_attend"][layer], published)
        outer = {d: elu(x) for d, x in outer.items()} if published else outer
        total = sum(e.exp() for e in outer.values())
        result.append({d: (e.exp() / total).squeeze() for d, e in outer.items()})
    return result


def hrkd(pairs: list[tuple[int, int]], weights: tuple[float, float, float] = (1, 1, 1), published: bool = False) -> Reference:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        layers = ([0] if weights[0] else []) + ([s for s, _ in pairs] if any(weights[1:]) else [])
        pooled = [g.S[f"hidden.{s}@mean" if f"hidden.{s}@mean" in g.S else f"hidden.{s}"] for s in layers]
        found = ratios(g, [{d: sum(x[row] for row in rows) / len(rows) for d, rows in MEMBERS.items()} for x in pooled], published)
        names = ("embedding", "hidden", "attention")
        total = {name: torch.zeros((), dtype=torch.float64) for name in names}
        for d, rows in MEMBERS.items():
            for row in rows:
                tokens = [at for at in g.tokens() if at[0] == row]
                if weights[0]:
                    losses = [ref_mse(linear(g, "embedding_projection", g.S["hidden.0"][at]), g.T["hidden.0"][at]) for at in tokens]
                    total["embedding"] = total["embedding"] + 2 * found[0][d] * sum(losses) / len(tokens)
                for (s, t), ratio in zip(pairs, found[1:] if weights[0] else found, strict=False):
                    if weights[1]:
                        losses = [ref_mse(linear(g, "hidden_projection", g.S[f"hidden.{s}"][at]), g.T[f"hidden.{t}"][at]) for at in tokens]
                        total["hidden"] = total["hidden"] + 2 * ratio[d] * sum(losses) / len(tokens)
                    if weights[2]:
                        a, b = g.S[f"attention_scores.{s}"][row], g.T[f"attention_scores.{t}"][row]
                        squares = [
                            ((a[:, query, key] - b[:, query, key]) ** 2).sum() / len(a)
                            for of_row, query, keys in g.rows_of_scores((s, t))
                            if of_row == row
                            for key in keys
                        ]
                        total["attention"] = total["attention"] + 2 * ratio[d] * sum(squares) / len(squares)
        return {name: (weight * total[name], 5) for name, weight in zip(names, weights, strict=True) if weight}

    return reference


ALL = frozenset({"embedding", "hidden", "attention"})

CASES: dict[str, Case] = {
    "hrkd": Case("hrkd", {"domains": 3, "graph_heads": 2}, hrkd(UNIFORM), sizes=(SMALL_BERT, BERT), coupled=ALL, set_up=milder),
    "hrkd weights": Case(
        "hrkd",
        {"domains": 4, "layers": [[2, 3], [1, 1]], "graph_heads": 3, "embedding": 2, "hidden": 3, "attention": 0.5},
        hrkd([(2, 3), (1, 1)], (2, 3, 0.5)),
        sizes=(SAME, BERT),
        coupled=ALL,
        set_up=milder,
    ),
    "hrkd hidden states": Case(
        "hrkd",
        {"domains": 3, "embedding": 0, "attention": 0},
        hrkd(UNIFORM, (0, 1, 0)),
        sizes=(SMALL_LLAMA, LLAMA),
        coupled=ALL,
    ),
    "hrkd published": Case(
        "hrkd",
        {"domains": 3, "published": True, "embedding": 0},
        hrkd(UNIFORM, (0, 1, 1), True),
        coupled=ALL,
        set_up=at_the_bend,
    ),
    "hrkd attention": Case("hrkd", {"domains": 3, "graph_heads": 1, "embedding": 0, "hidden": 0}, hrkd(UNIFORM, (0, 0, 1)), coupled=ALL),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
    ("hrkd", {"domains": 4}),
    ("hrkd", {"layers": "last"}),
    ("hrkd", {"graph_heads": 1}),
    ("hrkd", {"published": True}),
    ("hrkd", {"embedding": 0}),
    ("hrkd", {"hidden": 0}),
    ("hrkd", {"attention": 0}),
]

MODELS = [
    ("hrkd", {"domains": 3, "graph_heads": 2}, "bert", "masked_lm"),
    ("hrkd", {"domains": 3, "embedding": 0, "attention": 0, "layers": "last"}, "llama", "causal_lm"),
]

LIVE = [
    ("hrkd", "class", {"domains": 3}),
    ("hrkd", "class", {"domains": 3, "layers": [(2, 3)], "attention": 0, "graph_heads": 2}),
]
