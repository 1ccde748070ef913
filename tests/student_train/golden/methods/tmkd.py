"""TMKD: a header for each teacher."""

from collections.abc import Callable

import torch
from case import Case
from formulas import hard_choices, hard_classes, hard_scores, hard_tokens
from given import BERT, CHOICES, CLASSES, GROUPS, LLAMA, ROWS, SCORES, SMALL_LLAMA, TOKENS, Given, Reference, linear, ref_mse
from torch import Tensor

SECOND = {"second": BERT | dict(layers=3, width=10, windows=(None,) * 3)}


def tmkd(hard: Callable[[Given], tuple[Tensor, float]], decisions: list[slice | int], alpha: float = 0.5) -> Reference:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        total = torch.zeros((), dtype=torch.float64)
        for name in ("first", "second"):
            headers = torch.stack([linear(g, f"headers.of-{name}", vector) for vector in g.S["final"]])
            for at in decisions:
                total = total + ref_mse(headers[at].flatten(), g.T[f"{name}/task_logits"][at].flatten())
        soft = {"soft": (alpha * total, len(decisions))}
        if alpha == 1:
            return soft
        loss, count = hard(g)
        return soft | {"hard": ((1 - alpha) * loss, count)}

    return reference


CASES: dict[str, Case] = {
    "tmkd classes": Case("tmkd", {"alpha": 0.7}, tmkd(hard_classes, ROWS, 0.7), head=CLASSES, labels="classes", others=SECOND, zero=False),
    "tmkd without labels": Case(
        "tmkd", {"alpha": 1}, tmkd(hard_classes, ROWS, 1), head=CLASSES, sizes=(SMALL_LLAMA, LLAMA), others=SECOND, zero=False
    ),
    "tmkd scores": Case("tmkd", {}, tmkd(hard_scores, ROWS), head=SCORES, labels="scores", others=SECOND, zero=False),
    "tmkd choices": Case("tmkd", {}, tmkd(hard_choices, GROUPS), head=CHOICES, labels="choices", others=SECOND, zero=False),
    "tmkd tokens": Case("tmkd", {}, tmkd(hard_tokens, ROWS), head=TOKENS, labels="tokens", others=SECOND, zero=False),
}

CHANGES: list[tuple[str, dict[str, object]]] = [("tmkd classes", {"alpha": 0.2}), ("tmkd classes", {"alpha": 1})]

MODELS = [("tmkd", {}, "bert", "classification"), ("tmkd", {}, "llama", "classification"), ("tmkd", {}, "bert", "token_classification")]

LIVE = [("tmkd", "class", {}), ("tmkd", "class", {"alpha": 1.0})]

RUNS = [("tmkd", {})]
