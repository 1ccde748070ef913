"""Universal-KD: classifiers of inner blocks, and mixtures of what they say."""

import torch
from case import Case
from given import BERT, CLASSES, LLAMA, SMALL_BERT, SMALL_LLAMA, Given, linear, ref_ce, ref_kl
from torch import Tensor

THREE = SMALL_BERT | dict(layers=3, windows=(None, 2, None))
OF_TEACHER = frozenset(f"teacher_classifiers.{n}.{part}" for n in range(3) for part in ("weight", "bias"))
OF_STUDENT = frozenset(f"student_classifiers.{n}.{part}" for n in range(2) for part in ("weight", "bias"))
LABELLED = {0: 0, 1: 2, 3: 1, 4: 2}


def classifiers(g: Given) -> dict[str, tuple[Tensor, float]]:
    total = torch.zeros((), dtype=torch.float64)
    for row, label in LABELLED.items():
        for block in (1, 2, 3):
            total = total + ref_ce(linear(g, f"teacher_classifiers.{block - 1}", g.T[f"hidden.{block}"][row]), label)
    return {"classifiers": (total, 4)}


def pseudo(inner: int) -> object:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        total = torch.zeros((), dtype=torch.float64)
        for row in range(5):
            theirs = torch.stack([linear(g, f"teacher_classifiers.{n}", g.T[f"hidden.{n + 1}"][row]) for n in range(3)])
            for n in range(inner):
                mine = linear(g, f"student_classifiers.{n}", g.S[f"hidden.{n + 1}"][row])
                weights = torch.softmax(theirs @ mine, 0)
                mixed = sum((weights[j] * theirs[j] for j in range(3)), torch.zeros(()))
                total = total + ref_kl(mine, mixed)
        return {"pseudo": (total, 5)}

    return reference


CASES: dict[str, Case] = {
    "universal_kd classifiers": Case(
        "universal_kd",
        {"stage": "classifiers"},
        classifiers,
        head=CLASSES,
        sizes=(THREE, BERT),
        labels="classes",
        fixed=OF_STUDENT,
        zero=False,
    ),
    "universal_kd": Case(
        "universal_kd", {"stage": "distil"}, pseudo(2), head=CLASSES, sizes=(THREE, BERT), labels="classes", fixed=OF_TEACHER, zero=False
    ),
    "universal_kd causal": Case(
        "universal_kd", {"stage": "distil"}, pseudo(1), head=CLASSES, sizes=(SMALL_LLAMA, LLAMA), fixed=OF_TEACHER, zero=False
    ),
}

CHANGES: list[tuple[str, dict[str, object]]] = [("universal_kd", {"stage": "classifiers"})]

MODELS = [
    ("universal_kd", {"stage": "classifiers"}, "bert", "classification"),
    ("universal_kd", {"stage": "distil"}, "bert", "classification"),
    ("universal_kd", {"stage": "distil"}, "llama", "classification"),
]

LIVE = [("universal_kd", "class", {"stage": "distil"})]

RUNS = [("universal_kd", {"stage": "classifiers"}), ("universal_kd", {"stage": "distil"})]
