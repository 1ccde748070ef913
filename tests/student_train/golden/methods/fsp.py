"""FSP: Gram matrices between two blocks, number by number."""

import torch
from case import Case
from given import BERT, LLAMA, SAME, SMALL_LLAMA, Given, Reference, linear, sees
from torch import Tensor

Flow = tuple[tuple[int, int], tuple[int, int]]


def over_tokens(flows: list[Flow], projected: bool) -> Reference:
    def gram(g: Given, one: Tensor, other: Tensor, row: int, student: bool) -> Tensor:
        tokens = [token for r, token in g.tokens() if r == row]
        total: Tensor | float = 0.0
        for token in tokens:
            x, y = one[row, token], other[row, token]
            if student and projected:
                x, y = linear(g, "projection", x), linear(g, "projection", y)
            total = total + x[:, None] * y[None, :]
        return total / len(tokens)

    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        total = torch.zeros((), dtype=torch.float64)
        for (s1, t1), (s2, t2) in flows:
            for row in range(5):
                one = gram(g, g.S[f"hidden.{s1}"], g.S[f"hidden.{s2}"], row, True)
                other = gram(g, g.T[f"hidden.{t1}"], g.T[f"hidden.{t2}"], row, False)
                total = total + ((one - other) ** 2).mean()
        return {"flow": (total, 5)}

    return reference


def over_width(flows: list[Flow]) -> Reference:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        total, counts = torch.zeros((), dtype=torch.float64), []
        for (s1, t1), (s2, t2) in flows:
            assert g.teacher
            pairs = [
                (row, i, j)
                for row, i in g.tokens()
                for other, j in g.tokens()
                if row == other and sees(g.student, s2, i, j) and sees(g.teacher, t2, i, j)
            ]
            for row, i, j in pairs:
                one, other = (
                    (x[f"hidden.{a}"][row, i] @ x[f"hidden.{b}"][row, j]) / x[f"hidden.{a}"].shape[-1]
                    for x, a, b in ((g.S, s1, s2), (g.T, t1, t2))
                )
                total = total + (one - other) ** 2
            counts.append(len(pairs))
        return {"flow": (total, sum(counts) / len(counts))}

    return reference


UNIFORM_FLOWS: list[Flow] = [((0, 0), (1, 2)), ((1, 2), (2, 4))]
CASES: dict[str, Case] = {
    "fsp": Case("fsp", {}, over_tokens(UNIFORM_FLOWS, True)),
    "fsp equal widths": Case("fsp", {"layers": [[2, 4], [2, 4]]}, over_tokens([((2, 4), (2, 4))], False), sizes=(SAME, BERT), zero=False),
    "fsp over width": Case("fsp", {"over": "width"}, over_width(UNIFORM_FLOWS), sizes=(SMALL_LLAMA, LLAMA)),
}

CHANGES: list[tuple[str, dict[str, object]]] = [("fsp", {"layers": "last"}), ("fsp", {"over": "width"})]

MODELS = [("fsp", {}, "bert", "masked_lm"), ("fsp", {"over": "width"}, "llama", "causal_lm")]

LIVE = [("fsp", "mlm", {}), ("fsp", "modern", {"over": "width"}), ("fsp", "packed", {"over": "width", "layers": "last"})]

RUNS = [
    ("fsp", {}),
]
