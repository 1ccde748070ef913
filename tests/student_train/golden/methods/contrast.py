"""CRD's noise-contrastive loss over memory banks; K is the number of rows of other classes, so that every one of them is drawn."""

from collections.abc import Callable

import torch
from case import Case
from given import BERT, LLAMA, SMALL_LLAMA, Given, Reference, linear
from torch import Tensor

from student_train.methods.base import Method


def unit(x: Tensor) -> Tensor:
    return x / (x * x).sum(-1, keepdim=True).sqrt()


def entries(size: int, seed: int) -> Tensor:
    return unit(torch.randn(5, size, generator=torch.Generator().manual_seed(seed)))


def with_banks(normalisers: tuple[float, float]) -> Callable[[Method], None]:
    def set_up(method: Method) -> None:
        for seed, name in enumerate(("student_bank", "teacher_bank")):
            bank = method.get_buffer(name)
            bank.copy_(entries(bank.shape[1], seed))
        method.get_buffer("normalisers").copy_(torch.tensor(normalisers))

    return set_up


def nce(of_student: list[str], of_teacher: list[str], size: int, temperature: float, normalisers: tuple[float, float]) -> Reference:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        def embedded(features: dict[str, Tensor], sites: list[str], name: str) -> list[Tensor]:
            return [unit(linear(g, name, torch.cat([features[site][row] for site in sites]))) for row in range(5)]

        student, teacher = embedded(g.S, of_student, "student_embedding"), embedded(g.T, of_teacher, "teacher_embedding")
        banks = [entries(size, seed).double() for seed in range(2)]
        total = torch.zeros((), dtype=torch.float64)
        for anchors, bank, known in ((student, banks[1], normalisers[0]), (teacher, banks[0], normalisers[1])):
            exponentials = torch.stack([torch.exp(anchors[row] @ entry / temperature) for row in range(5) for entry in bank]).reshape(5, 5)
            z = known or exponentials.detach().mean()  # every row is in it once, as a positive or a negative
            p = exponentials / (5 * z)
            h = p / (p + 4 / 5)
            for row in range(5):
                others = [other for other in range(5) if other != row]
                total = total - h[row, row].log() - sum((1 - h[row, other]).log() for other in others)
        return {"contrast": (total / 2, 5)}

    return reference


NAMES = ["hidden.1", "hidden.2"], ["hidden.2", "hidden.4"]
EVERY = [f"hidden.{block}" for block in range(3)], [f"hidden.{block}" for block in range(5)]
OPTIONS: dict[str, object] = {"negatives": 4, "dimensions": 6}
COUPLED = frozenset({"contrast"})
CASES: dict[str, Case] = {
    "contrast": Case(
        "contrast",
        OPTIONS,
        nce(*NAMES, 6, 0.07, (1.5, 0.5)),
        labels="distinct",
        coupled=COUPLED,
        zero=False,
        set_up=with_banks((1.5, 0.5)),
    ),
    "contrast first batch": Case(
        "contrast",
        OPTIONS | {"layers": "all", "pooling": "mean", "temperature": 0.5},
        nce(*EVERY, 6, 0.5, (0, 0)),
        sizes=(SMALL_LLAMA, LLAMA),
        labels="distinct",
        coupled=COUPLED,
        zero=False,
        set_up=with_banks((0, 0)),
    ),
    "contrast pairs": Case(
        "contrast",
        OPTIONS | {"layers": [[1, 1], [2, 1], [2, 3]], "dimensions": 3, "temperature": 1},
        nce(["hidden.1", "hidden.2", "hidden.2"], ["hidden.1", "hidden.1", "hidden.3"], 3, 1, (2, 2)),
        sizes=(SMALL_LLAMA, BERT),
        labels="distinct",
        coupled=COUPLED,
        zero=False,
        set_up=with_banks((2, 2)),
    ),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
    ("contrast", {"layers": "last"}),
    ("contrast", {"pooling": "mean"}),
    ("contrast", {"dimensions": 5}),
    ("contrast", {"negatives": 3}),
    ("contrast", {"temperature": 0.1}),
    ("contrast", {"momentum": 0.9}),
]

MODELS = [("contrast", {"negatives": 3}, "bert", "classification"), ("contrast", {"negatives": 3}, "llama", "classification")]

LIVE = [("contrast", "class", {}), ("contrast", "class", {"layers": "all", "pooling": "mean"})]

RUNS = [("contrast", {"negatives": 8, "dimensions": 16})]
