"""Formulas of common terms, for the cases of several methods."""

from collections.abc import Callable

import torch
from given import Given, Reference, linear, ref_ce, ref_cosine, ref_kl, ref_maps, ref_mse, ref_relation
from torch import Tensor


def hard_classes(g: Given) -> tuple[Tensor, float]:
    return ref_ce(g.S["task_logits"][0], 0) + ref_ce(g.S["task_logits"][1], 2) + ref_ce(g.S["task_logits"][3], 1) + ref_ce(
        g.S["task_logits"][4], 2
    ), 4


def hard_scores(g: Given) -> tuple[Tensor, float]:
    z = g.S["task_logits"][:, 0]
    return (z[0] - 0.5) ** 2 + (z[2] - 1) ** 2 + (z[3] + 2) ** 2 + z[4] ** 2, 4


def hard_choices(g: Given) -> tuple[Tensor, float]:
    z = g.S["task_logits"][:, 0]
    return ref_ce(z[:2], 1) + ref_ce(z[2:], 2), 2


def hard_tokens(g: Given, site: str = "task_logits") -> tuple[Tensor, float]:
    z = g.S[site]
    labels = [2, 0, 1, 2, 2]
    return sum((ref_ce(z[n], label) for n, label in enumerate(labels)), torch.zeros(())), 5


def kd(
    hard: Callable[[Given], tuple[Tensor, float]], soft: Callable[[Tensor, Tensor], Tensor], slices: list[slice | int], alpha: float
) -> Reference:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        s, t = g.S["task_logits"], g.T["task_logits"]
        loss, count = hard(g)
        total = sum((soft(s[at].flatten(), t[at].flatten()) for at in slices), torch.zeros(()))
        return {"soft": (alpha * total, len(slices)), "hard": ((1 - alpha) * loss, count)}

    return reference


def lm_kd_dense(temperature: float, everywhere: bool) -> Reference:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        s, t = g.S["lm_logits"], g.T["lm_logits"]
        where = list(g.tokens()) if everywhere else [(n,) for n in range(len(s))]
        return {"words": (sum((ref_kl(s[at], t[at], temperature) for at in where), torch.zeros(())), len(where))}

    return reference


def lm_kd_top(temperature: float, everywhere: bool, ghost: bool) -> Reference:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        s, t = g.S["lm_logits"], g.T["lm_logits"]
        where = list(g.tokens()) if everywhere else [(n,) for n in range(len(s))]
        total = torch.zeros((), dtype=torch.float64)
        for at in where:
            ids = t.ids[at].tolist()
            p = t.log_probs[at].double()
            if not ghost:
                total = total + ref_kl(s[at][ids], p, temperature)
                continue
            q = s[at].softmax(0)
            others = [word for word in range(len(q)) if word not in ids]
            total = total + (p.exp() * (p - q[ids].log())).sum()
            if others:
                mass = 1 - p.exp().sum()
                total = total + mass * (mass / q[others].sum()).log()
        return {"words": (total, len(where))}

    return reference


def over_layers(pairs: list[tuple[int, int]], one: Callable[[Given, tuple[int, int]], Tensor]) -> Callable[[Given], Tensor]:
    return lambda g: sum((one(g, pair) for pair in pairs), torch.zeros(()))


def hidden(pairs: list[tuple[int, int]], projected: str | None, everywhere: bool) -> Callable[[Given], Tensor]:
    def one(g: Given, pair: tuple[int, int]) -> Tensor:
        s, t = g.S[f"hidden.{pair[0]}"], g.T[f"hidden.{pair[1]}"]
        where = list(g.tokens()) if everywhere else [(row,) for row in range(5)]
        return sum((ref_mse(linear(g, projected, s[at]) if projected else s[at], t[at]) for at in where), torch.zeros(()))

    return over_layers(pairs, one)


def maps(
    pairs: list[tuple[int, int]], site: str, distance: Callable[[Tensor, Tensor], Tensor], heads: int = 0, weight: float = 1
) -> Callable[[Given], Tensor]:
    """``heads`` 0: the values are maps; else relations of that many heads."""

    def one(g: Given, pair: tuple[int, int]) -> Tensor:
        s, t = (values[site if "final" in site else f"{site}.{block}"] for values, block in zip((g.S, g.T), pair, strict=True))
        if heads:
            s, t = ref_relation(s, heads), ref_relation(t, heads)
        return weight * ref_maps(g, s, t, pair, distance)

    return over_layers(pairs, one)


def tokens_term(name: str, total: Callable[[Given], Tensor]) -> Reference:
    return lambda g: {name: (total(g), 19)}


def pairs_term(name: str, pairs: list[tuple[int, int]], total: Callable[[Given], Tensor]) -> Reference:
    return lambda g: {name: (total(g), sum(g.pair_total(pair) for pair in pairs) / len(pairs))}


def together(*references: Reference) -> Reference:
    return lambda g: {name: term for reference in references for name, term in reference(g).items()}


def units_term(
    name: str,
    site: str,
    distance: Callable[[Tensor, Tensor], Tensor],
    at: str,
    projected: str | None = None,
    weight: float = 1,
    t_site: str = "",
) -> Reference:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        s, t = g.S[site], g.T[t_site or site]
        where = list(g.tokens()) if at == "all" else [(n,) for n in range(len(s))]
        total = sum((distance(linear(g, projected, s[i]) if projected else s[i], t[i]) for i in where), torch.zeros(()))
        return {name: (weight * total, len(where))}

    return reference


def similarity(g: Given) -> dict[str, tuple[Tensor, float]]:
    s, t = g.S["final"], g.T["final"]
    total = sum((ref_cosine(s[i], s[j]) - ref_cosine(t[i], t[j])) ** 2 for i in range(5) for j in range(5) if i != j)
    return {"similarity": (3 * total / 4, 5)}


def soft_ce(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda s, t: -(temperature**2) * (torch.softmax(t / temperature, 0) * torch.log(torch.softmax(s / temperature, 0))).sum()


def kl_at(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda s, t: ref_kl(s, t, temperature)


def score_mse(s: Tensor, t: Tensor) -> Tensor:
    return ((s - t) ** 2).sum()
