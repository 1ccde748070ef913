"""RAIL-KD: inner blocks against drawn inner blocks of the teacher."""

from collections.abc import Callable

import torch
from case import Case
from given import BERT, LLAMA, SMALL_BERT, SMALL_LLAMA, Given
from torch import Tensor

from student_train.moment import Moment

DEEP = BERT | dict(layers=6, windows=(None,) * 6)
THREE = SMALL_BERT | dict(layers=3, windows=(None, 2, None))
THIRD_EPOCH = Moment(step=11, steps=20, epoch_steps=5.0, seed=4)
DRAWN = [2, 4]
"""What that epoch draws of the blocks 1 to 5; a change of it would change runs that are resumed."""


def rail(pairs: list[tuple[int, int]], concatenated: bool) -> Callable[[Given], dict[str, tuple[Tensor, float]]]:
    def distance(g: Given, mine: Tensor, theirs: Tensor) -> Tensor:
        mine, theirs = g.P["student_projection.weight"] @ mine, g.P["teacher_projection.weight"] @ theirs
        return ((mine / (mine * mine).sum().sqrt() - theirs / (theirs * theirs).sum().sqrt()) ** 2).sum()

    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        total = torch.zeros((), dtype=torch.float64)
        for row in range(5):
            mine, theirs = [g.S[f"hidden.{s}"][row] for s, _ in pairs], [g.T[f"hidden.{t}"][row] for _, t in pairs]
            if concatenated:
                mine, theirs = [torch.cat(mine)], [torch.cat(theirs)]
            total = total + sum((distance(g, s, t) for s, t in zip(mine, theirs, strict=True)), torch.zeros(()))
        return {"hidden": (total, 5)}

    return reference


CASES: dict[str, Case] = {
    "rail_kd": Case("rail_kd", {"width": 6}, rail([*enumerate(DRAWN, 1)], False), sizes=(THREE, DEEP), moment=THIRD_EPOCH),
    "rail_kd concatenated": Case(
        "rail_kd", {"concatenated": True, "width": 5}, rail([*enumerate(DRAWN, 1)], True), sizes=(THREE, DEEP), moment=THIRD_EPOCH
    ),
    "rail_kd causal": Case("rail_kd", {}, rail([(1, 1)], False), sizes=(SMALL_LLAMA, LLAMA | dict(layers=2, windows=(None, 3)))),
}

CHANGES: list[tuple[str, dict[str, object]]] = [("rail_kd", {"concatenated": True}), ("rail_kd", {"width": 5})]

MODELS = [("rail_kd", {}, "bert", "classification"), ("rail_kd", {"concatenated": True}, "llama", "classification")]

LIVE = [("rail_kd", "class", {}), ("rail_kd", "causal", {"concatenated": True})]

RUNS = [("rail_kd", {"width": 8})]
