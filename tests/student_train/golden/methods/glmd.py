"""GLMD: word predictions at every token with its denominator, and clozes."""

from collections.abc import Callable

import torch
from case import Case
from given import CLM, LLAMA, MLM, SMALL_LLAMA, Given, Reference, ref_ce, ref_kl, ref_mse
from torch import Tensor

WORDS = [4, 0, 7]
"""Of the three classes."""


def every_place(distance: Callable[[Tensor, Tensor], Tensor], row_length: float) -> Reference:
    """A sum over the tokens that are there, over B S places."""

    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        s, t = g.S["lm_logits"], g.T["lm_logits"]
        total = torch.zeros((), dtype=torch.float64)
        for at in g.tokens():
            total = total + distance(s[at], t[at])
        return {"words": (total, 5 * row_length)}

    return reference


def labelled(distance: Callable[[Tensor, Tensor], Tensor], row_length: float) -> Reference:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        s, t = g.S["lm_logits"], g.T["lm_logits"]
        return {"words": (sum((distance(s[n], t[n]) for n in range(5)), torch.zeros(())), 5 * row_length)}

    return reference


def soft(distance: Callable[[Tensor, Tensor], Tensor]) -> Reference:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        s, t = g.S["lm_logits"], g.T["lm_logits"]
        total = torch.zeros((), dtype=torch.float64)
        for row in range(5):
            total = total + distance(torch.stack([s[row, word] for word in WORDS]), torch.stack([t[row, word] for word in WORDS]))
        return {"soft": (total, 5)}

    return reference


def hard(g: Given) -> dict[str, tuple[Tensor, float]]:
    z = g.S["lm_logits"]
    rows = {0: 0, 1: 2, 3: 1, 4: 2}  # row 2 has no label
    return {"hard": (sum((ref_ce(z[row][WORDS], label) for row, label in rows.items()), torch.zeros(())), 4)}


def ref_raw(s: Tensor, t: Tensor) -> Tensor:
    return sum(((a - b) ** 2 for a, b in zip(s, t, strict=True)), torch.zeros(())) / len(s)


CASES: dict[str, Case] = {
    "lm_kd of GLMD": Case(
        "lm_kd",
        {"positions": "all", "temperature": 15, "row_length": 9},
        every_place(lambda s, t: ref_kl(s, t, 15), 9),
        head=MLM,
        labels="tokens",
    ),
    "lm_kd of GLMD, masked alone": Case(
        "lm_kd",
        {"positions": "masked", "temperature": 15, "row_length": 9},
        labelled(lambda s, t: ref_kl(s, t, 15), 9),
        head=MLM,
        labels="tokens",
    ),
    "lm_kd raw mse": Case(
        "lm_kd",
        {"positions": "all", "divergence": "raw_mse", "row_length": 8},
        every_place(ref_raw, 8),
        head=CLM,
        sizes=(SMALL_LLAMA, LLAMA),
    ),
    "cloze_loss": Case("cloze_loss", {}, hard, head=MLM, labels="clozes", zero=False),
    "cloze_kd": Case("cloze_kd", {}, soft(ref_kl), head=MLM, labels="clozes"),
    "cloze_kd warm": Case("cloze_kd", {"temperature": 3}, soft(lambda s, t: ref_kl(s, t, 3)), head=MLM, labels="clozes"),
    "cloze_kd mse": Case("cloze_kd", {"divergence": "mse"}, soft(ref_mse), head=MLM, labels="clozes"),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
    ("lm_kd of GLMD", {"row_length": 7}),
    ("lm_kd of GLMD", {"row_length": None}),
    ("lm_kd raw mse", {"divergence": "mse"}),
    ("cloze_kd", {"temperature": 2}),
    ("cloze_kd", {"divergence": "mse"}),
]

MODELS = [
    ("lm_kd", {"positions": "all", "temperature": 15.0, "row_length": 8}, "bert", "masked_lm"),
    ("cloze_loss", {}, "bert", "masked_lm"),
    ("cloze_kd", {}, "bert", "masked_lm"),
]

LIVE = [
    ("lm_kd", "mlm", {"positions": "all", "temperature": 15.0, "row_length": 32}),
    ("lm_kd", "mlm", {"divergence": "raw_mse"}),
    ("cloze_kd", "cloze", {}),
    ("cloze_kd", "cloze", {"divergence": "mse"}),
]

RUNS = [
    ("lm_kd", {"positions": "all", "temperature": 15.0, "row_length": 16}),
    ("cloze_loss", {}),
    ("cloze_kd", {}),
]
