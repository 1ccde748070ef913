"""Labels, task logits and word predictions."""

from case import Case
from formulas import (
    hard_choices,
    hard_classes,
    hard_scores,
    hard_tokens,
    kd,
    kl_at,
    lm_kd_dense,
    lm_kd_top,
    score_mse,
    together,
    units_term,
)
from given import BERT, CHOICES, CLASSES, CLM, GROUPS, LLAMA, MLM, ROWS, SAME, SCORES, SMALL_LLAMA, TOKENS, ref_cosine

CASES: dict[str, Case] = {
    "task_loss classes": Case("task_loss", {}, lambda g: {"hard": hard_classes(g)}, head=CLASSES, labels="classes", zero=False),
    "task_loss scores": Case("task_loss", {}, lambda g: {"hard": hard_scores(g)}, head=SCORES, labels="scores", zero=False),
    "task_loss choices": Case("task_loss", {}, lambda g: {"hard": hard_choices(g)}, head=CHOICES, labels="choices", zero=False),
    "task_loss tokens": Case("task_loss", {}, lambda g: {"hard": hard_tokens(g)}, head=TOKENS, labels="tokens", zero=False),
    "lm_loss": Case(
        "lm_loss", {}, lambda g: {"words": hard_tokens(g, "lm_logits")}, head=CLM, sizes=(SMALL_LLAMA, LLAMA), labels="tokens", zero=False
    ),
    "kd classes": Case("kd", {"alpha": 0.7, "temperature": 3}, kd(hard_classes, kl_at(3), ROWS, 0.7), head=CLASSES, labels="classes"),
    "kd scores": Case("kd", {}, kd(hard_scores, score_mse, ROWS, 0.5), head=SCORES, labels="scores"),
    "kd choices": Case("kd", {"temperature": 4}, kd(hard_choices, kl_at(4), GROUPS, 0.5), head=CHOICES, labels="choices"),
    "kd tokens": Case("kd", {}, kd(hard_tokens, kl_at(2), ROWS, 0.5), head=TOKENS, labels="tokens"),
    "lm_kd dense": Case("lm_kd", {"temperature": 2}, lm_kd_dense(2, False), head=MLM, labels="tokens"),
    "lm_kd dense everywhere": Case("lm_kd", {"positions": "all"}, lm_kd_dense(1, True), head=CLM, sizes=(SMALL_LLAMA, LLAMA)),
    "lm_kd ghost": Case("lm_kd", {"positions": "masked", "top": 4}, lm_kd_top(1, False, True), head=MLM, labels="tokens"),
    "lm_kd ghost everywhere": Case("lm_kd", {"positions": "all", "top": 3}, lm_kd_top(1, True, True), head=CLM, sizes=(SMALL_LLAMA, LLAMA)),
    "lm_kd all words kept": Case("lm_kd", {"positions": "all", "top": 11}, lm_kd_top(1, True, True), head=CLM, sizes=(SMALL_LLAMA, LLAMA)),
    "lm_kd kept words": Case(
        "lm_kd",
        {"top": 4, "tail": "none", "temperature": 2},
        lm_kd_top(2, False, False),
        head=CLM,
        sizes=(SMALL_LLAMA, LLAMA),
        labels="tokens",
    ),
    "distilbert": Case(
        "distilbert",
        {},
        together(
            units_term("soft", "lm_logits", kl_at(2), "all", weight=5),
            lambda g: {"mlm": (2 * hard_tokens(g, "lm_logits@labels")[0], 5)},
            units_term("cosine", "final", ref_cosine, "all"),
        ),
        head=MLM,
        sizes=(SAME, BERT),
        labels="tokens",
    ),
    "distilbert masked": Case(
        "distilbert",
        {"positions": "masked", "temperature": 1, "mlm": 0, "cosine": 0.5},
        together(
            units_term("soft", "lm_logits", kl_at(1), "masked", weight=5), units_term("cosine", "final", ref_cosine, "all", weight=0.5)
        ),
        head=MLM,
        sizes=(SAME, BERT),
        labels="tokens",
    ),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
    ("kd classes", {"alpha": 0.2}),
    ("kd choices", {"temperature": 1}),
    ("lm_kd dense", {"positions": "all"}),
    ("lm_kd dense", {"temperature": 1}),
    ("lm_kd ghost", {"top": 5}),
    ("lm_kd ghost", {"tail": "none"}),
    ("distilbert", {"positions": "masked"}),
    ("distilbert", {"temperature": 1}),
    ("distilbert", {"soft": 0}),
    ("distilbert", {"mlm": 0}),
    ("distilbert", {"cosine": 0}),
]

MODELS = [
    ("task_loss", {}, "llama", "classification"),
    ("lm_loss", {}, "llama", "causal_lm"),
    ("kd", {}, "bert", "classification"),
    ("kd", {}, "bert", "multiple_choice"),
    ("kd", {}, "bert", "token_classification"),
    ("lm_kd", {"temperature": 2.0}, "bert", "masked_lm"),
    ("lm_kd", {"top": 5, "positions": "all"}, "llama", "causal_lm"),
    ("distilbert", {"cosine": 0}, "bert", "masked_lm"),
]

LIVE = [
    ("kd", "class", {"alpha": 0.3}),
    ("lm_kd", "mlm", {}),
    ("lm_kd", "mlm", {"positions": "all", "temperature": 2.0}),
    ("lm_kd", "causal", {"top": 8}),
    ("lm_kd", "packed", {}),
    ("distilbert", "mlm", {}),
]

RUNS = [
    ("task_loss", {}),
    ("kd", {}),
    ("lm_loss", {}),
    ("lm_kd", {}),
    ("distilbert", {}),
]
