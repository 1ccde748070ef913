"""ALP-KD: mixtures of teacher blocks, weighted by dot products."""

from collections.abc import Callable, Sequence

import torch
from case import Case
from given import BERT, LLAMA, SAME, SMALL_LLAMA, Given, linear
from torch import Tensor

from student_train.methods.alp_kd import ALPKD
from student_train.methods.base import Method

ALL = [(1, 2, 3, 4), (1, 2, 3, 4)]
BUCKETS = [(1, 2), (3, 4)]


def mixtures(seen: Sequence[Sequence[int]], projected: bool, detach: bool = False) -> Callable[[Given], dict[str, tuple[Tensor, float]]]:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        total = torch.zeros((), dtype=torch.float64)
        for row in range(5):
            for block, blocks in enumerate(seen, 1):
                mine = g.S[f"hidden.{block}"][row]
                mine = linear(g, "projection", mine) if projected else mine
                theirs = [g.T[f"hidden.{other}"][row] for other in blocks]
                scores = [(mine.detach() if detach else mine) @ state for state in theirs]
                top = max(score.item() for score in scores)
                weights = [(score - top).exp() for score in scores]
                mixed = sum((w * state for w, state in zip(weights, theirs, strict=True)), torch.zeros(())) / sum(weights)
                total = total + ((mine - mixed) ** 2).sum() / len(mixed)
        return {"hidden": (total, 5)}

    return reference


def near(method: Method) -> None:
    """Small states of the student, so that it looks at several blocks."""
    assert isinstance(method, ALPKD)
    with torch.no_grad():
        method.projection.weight.mul_(0.1)


CASES: dict[str, Case] = {
    "alp_kd": Case("alp_kd", {}, mixtures(ALL, True), set_up=near, zero=False),
    "alp_kd detached": Case("alp_kd", {"detach": True}, mixtures(ALL, True, True), sizes=(SMALL_LLAMA, LLAMA), set_up=near, zero=False),
    "alp_kd buckets": Case("alp_kd", {"buckets": True}, mixtures(BUCKETS, False), sizes=(SAME, BERT)),
}

CHANGES: list[tuple[str, dict[str, object]]] = [("alp_kd", {"buckets": True}), ("alp_kd", {"detach": True})]

MODELS = [("alp_kd", {}, "bert", "classification"), ("alp_kd", {"buckets": True, "detach": True}, "llama", "classification")]

LIVE = [("alp_kd", "class", {}), ("alp_kd", "causal", {"buckets": True, "detach": True})]

RUNS = [
    ("alp_kd", {}),
]
