"""RW-KD before it has weighed anything: all weights are 1. What it learns them from is tests/student_train/test_rw_kd.py."""

from case import Case
from formulas import hard_choices, hard_classes, hard_scores, hard_tokens, kd, kl_at, score_mse
from given import CHOICES, CLASSES, GROUPS, ROWS, SCORES, TOKENS, Reference


def weighed(halves: Reference, hard: float, soft: float) -> Reference:
    """``halves`` are those of kd with alpha 1/2."""
    weights = {"hard": hard, "soft": soft}
    return lambda g: {term: (2 * weights[term] * total, count) for term, (total, count) in halves(g).items() if weights[term]}


CASES: dict[str, Case] = {
    "rw_kd classes": Case("rw_kd", {}, weighed(kd(hard_classes, kl_at(1), ROWS, 0.5), 1, 1), head=CLASSES, labels="classes"),
    "rw_kd scores": Case("rw_kd", {}, weighed(kd(hard_scores, score_mse, ROWS, 0.5), 1, 1), head=SCORES, labels="scores"),
    "rw_kd choices": Case(
        "rw_kd",
        {"temperature": 3, "hard": 2, "soft": 0.5},
        weighed(kd(hard_choices, kl_at(3), GROUPS, 0.5), 2, 0.5),
        head=CHOICES,
        labels="choices",
    ),
    "rw_kd tokens": Case("rw_kd", {}, weighed(kd(hard_tokens, kl_at(1), ROWS, 0.5), 1, 1), head=TOKENS, labels="tokens"),
    "rw_kd teacher alone": Case("rw_kd", {"hard": 0}, weighed(kd(hard_classes, kl_at(1), ROWS, 0.5), 0, 1), head=CLASSES, labels="classes"),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
    ("rw_kd classes", {"temperature": 2}),
    ("rw_kd classes", {"hard": 0}),
    ("rw_kd classes", {"soft": 0}),
]

MODELS = [
    ("rw_kd", {}, "bert", "classification"),
    ("rw_kd", {"temperature": 2}, "llama", "classification"),
    ("rw_kd", {}, "bert", "multiple_choice"),
    ("rw_kd", {}, "bert", "token_classification"),
]

LIVE = [("rw_kd", "class", {}), ("rw_kd", "class", {"temperature": 3.0, "hard": 0})]
