"""Losses and gradients of every method against its paper's formula, written once more here in float64, token by token.

Five rows of unequal lengths (one padded on the left, one of a single token) keep padding in every batch.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from online.batch import IGNORED, Batch, Features, TopK, Value
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods import METHODS, parse_method
from student_train.methods.base import Method

torch.set_num_threads(1)

BERT = dict(
    family="bert", layers=4, width=12, heads=4, kv_heads=4, head_width=3, vocab=11, causal=False, pre_norm=False, windows=(None,) * 4
)
SMALL_BERT = BERT | dict(layers=2, width=8, head_width=2, windows=(None, 2))
LLAMA = dict(
    family="llama", layers=4, width=10, heads=4, kv_heads=2, head_width=6, vocab=11, causal=True, pre_norm=True, windows=(None, 3, None, 2)
)
SMALL_LLAMA = LLAMA | dict(layers=2, width=8, head_width=4, windows=(None, 3))
SAME = BERT | dict(layers=2, windows=(None, None))


def shape(sizes: dict[str, object], head: str = "base", labels: int = 0) -> ModelShape:
    return ModelShape.model_validate({**sizes, "head": head, "labels": labels})


def make_batch(labels: str = "") -> Batch:
    """Rows of 7, 4 (padded on the left), 2, 5 and 1 tokens; labels by kind."""
    mask = torch.zeros(5, 8, dtype=torch.bool)
    for row, (start, length) in enumerate([(0, 7), (4, 4), (0, 2), (0, 5), (0, 1)]):
        mask[row, start : start + length] = True
    token_labels = None
    if labels == "tokens":
        token_labels = torch.full((5, 8), IGNORED)
        for row, token, label in [(0, 1, 2), (0, 6, 0), (1, 4, 1), (3, 0, 2), (3, 2, 2)]:
            token_labels[row, token] = label
    row_labels = {
        "classes": torch.tensor([0, 2, IGNORED, 1, 2]),
        "scores": torch.tensor([0.5, math.nan, 1.0, -2.0, 0.0]),
        "choices": torch.tensor([0, 1, 0, 0, 1]),
    }.get(labels)
    return Batch(torch.arange(5), torch.ones(5, 8).long(), mask, None, None, None, token_labels, row_labels, torch.tensor([3, 3, 9, 9, 9]))


def sees(one: ModelShape, block: int, query: int, key: int) -> bool:
    window = one.windows[max(block, 1) - 1]
    if one.causal:
        return key <= query and (window is None or query - key < window)
    return window is None or abs(query - key) <= window


@functools.cache
def table_of(one: ModelShape, block: int) -> Tensor:
    """[8, 8] bool: what ``sees`` says of every query and key."""
    return torch.tensor([[sees(one, block, query, key) for key in range(8)] for query in range(8)])


def make_value(key: FeatureKey, one: ModelShape, batch: Batch, generator: torch.Generator) -> Value:
    rows, tokens = batch.mask.shape
    if key.site.startswith("attention"):
        scores = torch.randn(rows, one.heads, tokens, tokens, generator=generator) * 2
        assert key.layer is not None
        unseen = ~(table_of(one, key.layer) & batch.mask[:, None, None, :])
        scores = scores.masked_fill(unseen, torch.finfo(torch.float32).min)
        return scores if key.site == "attention_scores" else scores.softmax(-1)
    width = one.width_of(key.site)
    if key.positions == "all":
        value = torch.randn(rows, tokens, width, generator=generator) * 2 * batch.mask[..., None]
    elif key.positions in ("labels", "masked"):
        value = torch.randn(int(batch.labelled.sum()), width, generator=generator) * 2
    else:
        value = torch.randn(rows, width, generator=generator) * 2
    if not key.form:
        return value
    log_probs, ids = value.log_softmax(-1).topk(int(key.form.removeprefix("top")))
    tail = (1 - log_probs.double().exp().sum(-1)).clamp(min=0).log().clamp(min=torch.finfo(torch.float32).min).float()
    return TopK(ids, log_probs, tail)


def make_features(keys: frozenset[FeatureKey], one: ModelShape, batch: Batch, seed: int) -> Features:
    return {key: make_value(key, one, batch, torch.Generator().manual_seed(seed + n)) for n, key in enumerate(sorted(keys))}


# The formulas. P: the method's parameters; S, T: features by name; all float64.
Named = dict[str, Tensor]


@dataclasses.dataclass
class Given:
    S: Named
    T: dict[str, Tensor | TopK]
    P: Named
    batch: Batch
    student: ModelShape
    teacher: ModelShape | None

    def tokens(self) -> Iterator[tuple[int, int]]:
        yield from ((int(row), int(token)) for row, token in self.batch.mask.nonzero())

    def rows_of_scores(self, blocks: tuple[int, int]) -> Iterator[tuple[int, int, list[int]]]:
        """(row, query, keys that both models see)."""
        assert self.teacher
        for row, query in self.tokens():
            keys = [
                k
                for r, k in self.tokens()
                if r == row and sees(self.student, blocks[0], query, k) and sees(self.teacher, blocks[1], query, k)
            ]
            yield row, query, keys

    def pair_total(self, blocks: tuple[int, int]) -> int:
        return sum(len(keys) for _, _, keys in self.rows_of_scores(blocks))


def ref_kl(s: Tensor, t: Tensor, temperature: float = 1.0) -> Tensor:
    p, q = torch.softmax(t / temperature, 0), torch.softmax(s / temperature, 0)
    return temperature**2 * (p * (p / q).log()).sum()


def ref_mse(s: Tensor, t: Tensor) -> Tensor:
    return ((s - t) ** 2).sum() / len(s)


def ref_cosine(s: Tensor, t: Tensor) -> Tensor:
    return 1 - (s @ t) / ((s @ s).sqrt() * (t @ t).sqrt())


def ref_huber(s: Tensor, t: Tensor) -> Tensor:
    d = (s - t).abs()
    return torch.where(d < 1, d * d / 2, d - 0.5).sum() / len(s)


def ref_ce(z: Tensor, label: int) -> Tensor:
    return -(z[label] - z.exp().sum().log())


def ref_maps(given: Given, maps_s: Tensor, maps_t: Tensor, blocks: tuple[int, int], distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Sum over queries of the mean over heads of a distance between rows of scores."""
    total = torch.zeros((), dtype=torch.float64)
    heads = maps_s.shape[1]
    for row, query, keys in given.rows_of_scores(blocks):
        for head in range(heads):
            total = total + distance(maps_s[row, head, query, keys], maps_t[row, head, query, keys]) / heads
    return total


def ref_relation(x: Tensor, heads: int) -> Tensor:
    parts = x.reshape(*x.shape[:2], heads, -1)
    return torch.einsum("bihd,bjhd->bhij", parts, parts) / math.sqrt(parts.shape[-1])


def squares(s: Tensor, t: Tensor) -> Tensor:
    return ((s - t) ** 2).sum()


Reference = Callable[[Given], dict[str, tuple[Tensor, float]]]


def linear(given: Given, name: str, x: Tensor) -> Tensor:
    return given.P[f"{name}.weight"] @ x + given.P[f"{name}.bias"]


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
    return {"similarity": (3 * total, 20)}


def soft_ce(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda s, t: -(temperature**2) * (torch.softmax(t / temperature, 0) * torch.log(torch.softmax(s / temperature, 0))).sum()


def kl_at(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda s, t: ref_kl(s, t, temperature)


def score_mse(s: Tensor, t: Tensor) -> Tensor:
    return ((s - t) ** 2).sum()


CLASSES, SCORES, CHOICES, TOKENS = ("classification", 3), ("classification", 1), ("multiple_choice", 1), ("token_classification", 3)
ROWS: list[slice | int] = [0, 1, 2, 3, 4]
GROUPS: list[slice | int] = [slice(0, 2), slice(2, 5)]
MLM, CLM, BASE = ("masked_lm", 0), ("causal_lm", 0), ("base", 0)
UNIFORM = [(1, 2), (2, 4)]
LAST = [(2, 4)]
PAIRS = [[2, 3], [1, 1]]

Case = tuple[str, dict[str, object], tuple[str, int], tuple[dict, dict], str, Reference]
CASES: dict[str, Case] = {
    "task_loss classes": ("task_loss", {}, CLASSES, (SMALL_BERT, BERT), "classes", lambda g: {"hard": hard_classes(g)}),
    "task_loss scores": ("task_loss", {}, SCORES, (SMALL_BERT, BERT), "scores", lambda g: {"hard": hard_scores(g)}),
    "task_loss choices": ("task_loss", {}, CHOICES, (SMALL_BERT, BERT), "choices", lambda g: {"hard": hard_choices(g)}),
    "task_loss tokens": ("task_loss", {}, TOKENS, (SMALL_BERT, BERT), "tokens", lambda g: {"hard": hard_tokens(g)}),
    "lm_loss": ("lm_loss", {}, CLM, (SMALL_LLAMA, LLAMA), "tokens", lambda g: {"words": hard_tokens(g, "lm_logits")}),
    "kd classes": ("kd", {"alpha": 0.7, "temperature": 3}, CLASSES, (SMALL_BERT, BERT), "classes", kd(hard_classes, kl_at(3), ROWS, 0.7)),
    "kd scores": ("kd", {}, SCORES, (SMALL_BERT, BERT), "scores", kd(hard_scores, score_mse, ROWS, 0.5)),
    "kd choices": ("kd", {"temperature": 4}, CHOICES, (SMALL_BERT, BERT), "choices", kd(hard_choices, kl_at(4), GROUPS, 0.5)),
    "kd tokens": ("kd", {}, TOKENS, (SMALL_BERT, BERT), "tokens", kd(hard_tokens, kl_at(2), ROWS, 0.5)),
    "lm_kd dense": ("lm_kd", {"temperature": 2}, MLM, (SMALL_BERT, BERT), "tokens", lm_kd_dense(2, False)),
    "lm_kd dense everywhere": ("lm_kd", {"positions": "all"}, CLM, (SMALL_LLAMA, LLAMA), "", lm_kd_dense(1, True)),
    "lm_kd ghost": ("lm_kd", {"positions": "masked", "top": 4}, MLM, (SMALL_BERT, BERT), "tokens", lm_kd_top(1, False, True)),
    "lm_kd ghost everywhere": ("lm_kd", {"positions": "all", "top": 3}, CLM, (SMALL_LLAMA, LLAMA), "", lm_kd_top(1, True, True)),
    "lm_kd all words kept": ("lm_kd", {"positions": "all", "top": 11}, CLM, (SMALL_LLAMA, LLAMA), "", lm_kd_top(1, True, True)),
    "lm_kd kept words": (
        "lm_kd",
        {"top": 4, "tail": "none", "temperature": 2},
        CLM,
        (SMALL_LLAMA, LLAMA),
        "tokens",
        lm_kd_top(2, False, False),
    ),
    "hid_cls": ("hid_cls", {}, BASE, (SMALL_BERT, BERT), "", lambda g: {"hidden": (hidden(UNIFORM, "projection", False)(g), 5)}),
    "hid_cls equal widths": (
        "hid_cls",
        {"layers": [[0, 0], [2, 1]]},
        BASE,
        (SAME, BERT),
        "",
        lambda g: {"hidden": (hidden([(0, 0), (2, 1)], None, False)(g), 5)},
    ),
    "hid_seq": ("hid_seq", {}, BASE, (SMALL_LLAMA, LLAMA), "", tokens_term("hidden", hidden(UNIFORM, "projection", True))),
    "hid_seq last": ("hid_seq", {"layers": "last"}, BASE, (SAME, BERT), "", tokens_term("hidden", hidden(LAST, None, True))),
    "att_mse": ("att_mse", {}, BASE, (SMALL_BERT, BERT), "", pairs_term("attention", UNIFORM, maps(UNIFORM, "attention_scores", squares))),
    "att_mse causal": (
        "att_mse",
        {"layers": PAIRS},
        BASE,
        (SMALL_LLAMA, LLAMA),
        "",
        pairs_term("attention", [(2, 3), (1, 1)], maps([(2, 3), (1, 1)], "attention_scores", squares)),
    ),
    "att_kl": ("att_kl", {}, BASE, (SMALL_BERT, BERT), "", tokens_term("attention", maps(UNIFORM, "attention_scores", ref_kl))),
    "att_kl causal": ("att_kl", {}, BASE, (SMALL_LLAMA, LLAMA), "", tokens_term("attention", maps(UNIFORM, "attention_scores", ref_kl))),
    "val_kl": ("val_kl", {}, BASE, (SMALL_BERT, BERT), "", tokens_term("value", maps(UNIFORM, "value", ref_kl, 4))),
    "val_kl causal": (
        "val_kl",
        {"layers": PAIRS},
        BASE,
        (SMALL_LLAMA, LLAMA),
        "",
        tokens_term("value", maps([(2, 3), (1, 1)], "value", ref_kl, 2)),
    ),
    "minilm": (
        "minilm",
        {"value": 0.5},
        BASE,
        (SMALL_BERT, BERT),
        "",
        together(
            tokens_term("attention", maps(LAST, "attention_scores", ref_kl)), tokens_term("value", maps(LAST, "value", ref_kl, 4, 0.5))
        ),
    ),
    "minilm causal": (
        "minilm",
        {"attention": 2},
        BASE,
        (SMALL_LLAMA, LLAMA),
        "",
        together(
            tokens_term("attention", maps(LAST, "attention_scores", ref_kl, 0, 2)), tokens_term("value", maps(LAST, "value", ref_kl, 2))
        ),
    ),
    "minilmv2": (
        "minilmv2",
        {},
        BASE,
        (SMALL_BERT, BERT),
        "",
        together(*(tokens_term(x, maps(LAST, x, ref_kl, 4)) for x in ("query", "key", "value"))),
    ),
    "minilmv2 causal": (
        "minilmv2",
        {"layers": [[2, 3]], "relation_heads": 2, "key": 0.3},
        BASE,
        (SMALL_LLAMA, LLAMA),
        "",
        together(*(tokens_term(x, maps([(2, 3)], x, ref_kl, 2, 0.3 if x == "key" else 1)) for x in ("query", "key", "value"))),
    ),
    "tinybert": (
        "tinybert",
        {"embedding": 2, "hidden": 0.5, "attention": 3},
        BASE,
        (SMALL_BERT, BERT),
        "",
        together(
            tokens_term("embedding", lambda g: 2 * hidden([(0, 0)], "embedding_projection", True)(g)),
            tokens_term("hidden", lambda g: 0.5 * hidden(UNIFORM, "hidden_projection", True)(g)),
            pairs_term("attention", UNIFORM, maps(UNIFORM, "attention_scores", squares, 0, 3)),
        ),
    ),
    "distilbert": (
        "distilbert",
        {},
        MLM,
        (SAME, BERT),
        "tokens",
        together(
            units_term("soft", "lm_logits", kl_at(2), "all", weight=5),
            lambda g: {"mlm": (2 * hard_tokens(g, "lm_logits@labels")[0], 5)},
            units_term("cosine", "final", ref_cosine, "all"),
        ),
    ),
    "distilbert masked": (
        "distilbert",
        {"positions": "masked", "temperature": 1, "mlm": 0, "cosine": 0.5},
        MLM,
        (SAME, BERT),
        "tokens",
        together(
            units_term("soft", "lm_logits", kl_at(1), "masked", weight=5), units_term("cosine", "final", ref_cosine, "all", weight=0.5)
        ),
    ),
    "sentence": (
        "sentence",
        {"mse": 2, "similarity": 3},
        BASE,
        (SMALL_BERT, BERT),
        "",
        together(
            units_term("cosine", "final", ref_cosine, "mean", "projection"),
            units_term("mse", "final", ref_mse, "mean", "projection", 2),
            similarity,
        ),
    ),
    "sentence hidden": (
        "sentence",
        {"pooling": "last", "student_layer": 1, "teacher_layer": 0},
        BASE,
        (SAME, BERT),
        "",
        units_term("cosine", "hidden.1", ref_cosine, "last", t_site="hidden.0"),
    ),
    "match hidden": (
        "match",
        {"site": "hidden", "layers": [[2, 3]], "projection": "linear"},
        BASE,
        (SMALL_BERT, BERT),
        "",
        units_term("hidden", "hidden.2", ref_mse, "all", "projections.0", t_site="hidden.3"),
    ),
    "match embedding": (
        "match",
        {"site": "hidden", "layers": [[0, 0]], "distance": "cosine"},
        BASE,
        (SAME, BERT),
        "",
        units_term("hidden", "hidden.0", ref_cosine, "all"),
    ),
    "match final": (
        "match",
        {"site": "final", "positions": "mean", "distance": "huber"},
        BASE,
        (SAME, BERT),
        "",
        units_term("final", "final", ref_huber, "mean"),
    ),
    "match words": (
        "match",
        {"site": "lm_logits", "positions": "labels", "distance": "kl", "temperature": 0.5},
        MLM,
        (SAME, BERT),
        "tokens",
        units_term("lm_logits", "lm_logits", kl_at(0.5), "labels"),
    ),
    "match task": (
        "match",
        {"site": "task_logits", "distance": "ce", "temperature": 2},
        CLASSES,
        (SAME, BERT),
        "classes",
        units_term("task_logits", "task_logits", soft_ce(2), "row"),
    ),
    "match head input": (
        "match",
        {"site": "head_input", "projection": "linear", "distance": "huber"},
        MLM,
        (SMALL_BERT, BERT),
        "",
        units_term("head_input", "head_input", ref_huber, "all", "projections.0"),
    ),
    "match query": (
        "match",
        {"site": "query", "projection": "linear", "layers": "last"},
        BASE,
        (SMALL_LLAMA, LLAMA),
        "",
        units_term("query", "query.2", ref_mse, "all", "projections.0", t_site="query.4"),
    ),
    "match scores kl": (
        "match",
        {"site": "attention_scores", "distance": "kl", "temperature": 0.5},
        BASE,
        (SMALL_LLAMA, LLAMA),
        "",
        tokens_term("attention_scores", maps(UNIFORM, "attention_scores", kl_at(0.5))),
    ),
    "match scores ce": (
        "match",
        {"site": "attention_scores", "distance": "ce", "temperature": 2},
        BASE,
        (SMALL_BERT, BERT),
        "",
        tokens_term("attention_scores", maps(UNIFORM, "attention_scores", soft_ce(2))),
    ),
    "match scores cosine": (
        "match",
        {"site": "attention_scores", "distance": "cosine"},
        BASE,
        (SMALL_BERT, BERT),
        "",
        tokens_term("attention_scores", maps(UNIFORM, "attention_scores", ref_cosine)),
    ),
    "match scores huber": (
        "match",
        {"site": "attention_scores", "distance": "huber"},
        BASE,
        (SMALL_BERT, BERT),
        "",
        pairs_term("attention_scores", UNIFORM, maps(UNIFORM, "attention_scores", lambda s, t: len(s) * ref_huber(s, t))),
    ),
    "match probs": (
        "match",
        {"site": "attention_probs"},
        BASE,
        (SMALL_BERT, BERT),
        "",
        pairs_term("attention_probs", UNIFORM, maps(UNIFORM, "attention_probs", squares)),
    ),
    "match relation": (
        "match",
        {"site": "hidden", "form": "relation", "distance": "kl"},
        BASE,
        (SMALL_LLAMA, LLAMA),
        "",
        tokens_term("hidden", maps(UNIFORM, "hidden", ref_kl, 1)),
    ),
    "match final relation": (
        "match",
        {"site": "final", "form": "relation"},
        BASE,
        (SMALL_BERT, BERT),
        "",
        pairs_term("final", LAST, maps(LAST, "final", squares, 1)),
    ),
}


def setting(name: str) -> tuple[Method, Features, Features, Batch, ModelShape, ModelShape]:
    method_name, options, (head, labels), (small, large), label_kind, _ = CASES[name]
    student, teacher, batch = shape(small, head, labels), shape(large, head, labels), make_batch(label_kind)
    torch.manual_seed(0)
    method = parse_method(method_name, options, student, teacher)
    return (
        method,
        make_features(method.student_keys, student, batch, 1),
        make_features(method.teacher_keys, teacher, batch, 2),
        batch,
        student,
        teacher,
    )


def leaves(features: Features) -> Features:
    return {key: value.clone().requires_grad_() for key, value in features.items() if isinstance(value, Tensor)}


def named(features: Features, double: bool) -> dict[str, Tensor | TopK]:
    """By site and layer; where a site is read twice, the second with its positions."""
    result: dict[str, Tensor | TopK] = {}
    for key, value in sorted(features.items(), key=lambda item: str(item[0])):
        changed = value.detach().double().requires_grad_(double) if isinstance(value, Tensor) else value
        result[str(key) if key.name in result else key.name] = changed
    return result


def test_every_method_has_a_formula() -> None:
    assert {case[0] for case in CASES.values()} == set(METHODS)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_the_formula_in_float64(name: str) -> None:
    method, student, teacher, batch, *shapes = setting(name)
    features = leaves(student)
    terms = method(features, teacher, batch)
    counts = method.counts(batch)
    exact = Given(
        named(student, True),
        named(teacher, False),
        {n: p.detach().double().requires_grad_() for n, p in method.named_parameters()},
        batch,
        *shapes,
    )
    expected = CASES[name][5](exact)

    assert list(terms) == list(counts)
    assert set(terms) == set(expected)
    for term, (total, count) in expected.items():
        assert terms[term].dtype == counts[term].dtype == torch.float32
        assert terms[term].shape == counts[term].shape == ()
        assert counts[term].item() == pytest.approx(count)
        assert terms[term].item() == pytest.approx(total.item(), rel=2e-5)

    inputs = [*features.values(), *method.parameters()]
    exact_inputs = [exact.S[str(k)] if str(k) in exact.S else exact.S[k.name] for k in features] + list(exact.P.values())
    ours = torch.autograd.grad(sum(terms.values()), inputs)
    theirs = torch.autograd.grad(sum(total for total, _ in expected.values()), exact_inputs)
    for mine, true in zip(ours, theirs, strict=True):
        assert true.abs().max() > 0
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=2e-5)


def padded(features: Features, junk: float) -> Features:
    """The same features in a batch with three more tokens of padding, with ``junk`` wherever padding is read or reads."""
    real = torch.nn.functional.pad(make_batch().mask, (0, 3))
    result: Features = {}
    for key, value in features.items():
        if key.positions != "all":
            result[key] = value
        elif isinstance(value, TopK):
            tensors = (torch.nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, 3)) for tensor in value)
            ids, log_probs, tail = tensors
            result[key] = TopK(ids, log_probs.masked_fill(~real[..., None], junk), tail.masked_fill(~real, junk))
        elif key.site.startswith("attention"):
            pairs = real[:, None, :, None] & real[:, None, None, :]
            result[key] = torch.nn.functional.pad(value, (0, 3, 0, 3)).masked_fill(~pairs, junk)
        else:
            result[key] = torch.nn.functional.pad(value, (0, 0, 0, 3)).masked_fill(~real[..., None], junk)
    return result


def longer(batch: Batch) -> Batch:
    pad = torch.nn.functional.pad
    labels = None if batch.token_labels is None else pad(batch.token_labels, (0, 3), value=IGNORED)
    return dataclasses.replace(batch, mask=pad(batch.mask, (0, 3)), input_ids=pad(batch.input_ids, (0, 3)), token_labels=labels)


@pytest.mark.parametrize("name", CASES)
def test_what_stands_on_padding_reaches_neither_loss_nor_gradient(name: str) -> None:
    method, student, teacher, batch, *_ = setting(name)
    one, other = leaves(student), leaves(padded(student, math.nan))
    terms, same = method(one, teacher, batch), method(other, padded(teacher, math.nan), longer(batch))
    for term, count in method.counts(longer(batch)).items():
        assert torch.equal(count, method.counts(batch)[term])
        torch.testing.assert_close(same[term], terms[term], rtol=1e-6, atol=1e-6)
    sum(terms.values()).backward()
    sum(same.values()).backward()
    for key, leaf in one.items():
        gradient = padded({key: leaf.grad}, 0)[key]
        torch.testing.assert_close(other[key].grad, gradient, rtol=1e-5, atol=1e-6)


def part(batch: Batch, features: Features, rows: slice) -> tuple[Batch, Features]:
    """A run of the batch's rows and their features."""
    first, last = (int(batch.labelled[:row].sum()) for row in (rows.start, rows.stop))

    def cut(key: FeatureKey, value: Tensor) -> Tensor:
        return value[first:last] if key.positions in ("labels", "masked") else value[rows]

    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    smaller = Batch(**{name: value if value is None else value[rows] for name, value in values.items()})
    return smaller, {k: TopK(*(cut(k, x) for x in v)) if isinstance(v, TopK) else cut(k, v) for k, v in features.items()}


@pytest.mark.parametrize("name", CASES)
def test_sums_and_counts_of_two_micro_batches_add_up(name: str) -> None:
    method, student, teacher, batch, *_ = setting(name)
    whole, counts = method(student, teacher, batch), method.counts(batch)
    total, number = dict.fromkeys(whole, 0.0), dict.fromkeys(whole, 0.0)
    for rows in (slice(0, 2), slice(2, 5)):  # a group is never torn apart
        smaller, of_student = part(batch, student, rows)
        for term, loss in method(of_student, part(batch, teacher, rows)[1], smaller).items():
            total[term] += loss.item()
            number[term] += method.counts(smaller)[term].item()
    for term in whole:
        coupled = term == "similarity"  # pairs of rows: only those of one micro-batch are compared
        assert (number[term] == pytest.approx(counts[term].item())) is not coupled
        assert (total[term] == pytest.approx(whole[term].item(), rel=1e-5)) is not coupled


ZERO = {name: case for name, case in CASES.items() if case[0] not in ("task_loss", "lm_loss") and "ce" not in case[1].values()}


@pytest.mark.parametrize("name", ZERO)
def test_a_student_equal_to_its_teacher_has_no_loss_but_that_of_labels(name: str) -> None:
    method_name, options, (head, labels), (_, large), label_kind, _ = CASES[name]
    one, batch = shape(large, head, labels), make_batch(label_kind)
    if isinstance(options.get("layers"), list):  # uniform and last are the identity already
        options = options | {"layers": [[1, 1]]}
    if "student_layer" in options:
        options = options | {"student_layer": options["teacher_layer"]}
    method = parse_method(method_name, options, one, one)
    for module in method.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.eye_(module.weight)
            torch.nn.init.zeros_(module.bias)
    teacher = make_features(method.teacher_keys | {key for key in method.student_keys if not key.form}, one, batch, 3)
    for key in [key for key in teacher if key.form]:
        teacher[key] = top_of(teacher[FeatureKey("lm_logits", None, key.positions)], int(key.form[3:]))
    terms = method({key: teacher[key] for key in method.student_keys}, teacher, batch)
    for term in set(terms) - {"hard", "mlm"}:
        assert terms[term].item() == pytest.approx(0, abs=2e-5)


def top_of(logits: Value, kept: int) -> TopK:
    assert isinstance(logits, Tensor)
    log_probs, ids = logits.log_softmax(-1).sort(descending=True)
    tail = log_probs[..., kept:].logsumexp(-1) if kept < logits.shape[-1] else torch.full(logits.shape[:-1], torch.finfo(torch.float32).min)
    return TopK(ids[..., :kept], log_probs[..., :kept], tail)


CHANGES: list[tuple[str, dict[str, object]]] = [
    ("kd classes", {"alpha": 0.2}),
    ("kd choices", {"temperature": 1}),
    ("lm_kd dense", {"positions": "all"}),
    ("lm_kd dense", {"temperature": 1}),
    ("lm_kd ghost", {"top": 5}),
    ("lm_kd ghost", {"tail": "none"}),
    ("hid_cls", {"layers": "last"}),
    ("hid_cls", {"positions": "last"}),
    ("hid_seq", {"layers": [[1, 1]]}),
    ("att_mse", {"layers": [[2, 2]]}),
    ("att_kl", {"layers": [[1, 4]]}),
    ("val_kl", {"layers": "last"}),
    ("minilm", {"layers": [[2, 3]]}),
    ("minilm", {"attention": 0}),
    ("minilm", {"value": 0}),
    ("minilmv2", {"layers": [[2, 3]]}),
    ("minilmv2", {"relation_heads": 2}),
    ("minilmv2", {"query": 0}),
    ("minilmv2", {"key": 0.5}),
    ("minilmv2", {"value": 2}),
    ("tinybert", {"layers": [[1, 1], [2, 2]]}),
    ("tinybert", {"embedding": 0}),
    ("tinybert", {"hidden": 0}),
    ("tinybert", {"attention": 0}),
    ("distilbert", {"positions": "masked"}),
    ("distilbert", {"temperature": 1}),
    ("distilbert", {"soft": 0}),
    ("distilbert", {"mlm": 0}),
    ("distilbert", {"cosine": 0}),
    ("sentence", {"pooling": "first"}),
    ("sentence", {"student_layer": 1}),
    ("sentence", {"teacher_layer": 1}),
    ("sentence", {"cosine": 0}),
    ("sentence", {"mse": 0}),
    ("sentence", {"similarity": 0}),
    ("match hidden", {"site": "value"}),
    ("match final", {"distance": "mse"}),
    ("match hidden", {"layers": "last"}),
    ("match final", {"positions": "last"}),
    ("match final relation", {"form": "values", "projection": "linear"}),
    ("match words", {"temperature": 1}),
]


def answer(name: str, changed: dict[str, object]) -> tuple[object, ...]:
    """All that an option can act on: what is read, and each term's mean."""
    method_name, options, head, sizes, label_kind, _ = CASES[name]
    student, teacher = (shape(size, *head) for size in sizes)
    torch.manual_seed(0)
    method, batch = parse_method(method_name, options | changed, student, teacher), make_batch(label_kind)
    terms = method(make_features(method.student_keys, student, batch, 1), make_features(method.teacher_keys, teacher, batch, 2), batch)
    return (
        method.student_keys,
        method.teacher_keys,
        {term: terms[term].item() / count.item() for term, count in method.counts(batch).items()},
    )


@pytest.mark.parametrize(("name", "changed"), CHANGES)
def test_an_option_changes_the_answer(name: str, changed: dict[str, object]) -> None:
    assert answer(name, changed) != answer(name, {})
    assert answer(name, {}) == answer(name, {})


def test_every_option_is_among_the_changed_ones() -> None:
    options = {(name, option) for name, cls in METHODS.items() for option in options_of(cls)}
    assert options == {(CASES[name][0], option) for name, changed in CHANGES for option in changed}


def options_of(cls: type[Method]) -> list[str]:
    return [name for name, parameter in inspect.signature(cls).parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]


def test_batches_without_any_label_give_zero_that_can_still_be_trained_on() -> None:
    for name in ("task_loss classes", "task_loss scores", "task_loss choices", "task_loss tokens", "lm_loss", "kd classes"):
        method_name, options, head, sizes, *_ = CASES[name]
        student, teacher = (shape(size, *head) for size in sizes)
        method, batch = parse_method(method_name, options, student, teacher), make_batch()
        features = leaves(make_features(method.student_keys, student, batch, 1))
        terms = method(features, make_features(method.teacher_keys, teacher, batch, 2), batch)
        term = "words" if name == "lm_loss" else "hard"
        assert method.counts(batch)[term] == 0
        assert terms[term] == 0
        terms[term].backward()
        assert all(leaf.grad is not None and not leaf.grad.any() for leaf in features.values())


def test_half_precision_features_are_compared_in_float32() -> None:
    method, student, teacher, batch, *_ = setting("tinybert")
    halves: list[Features] = [{key: value.bfloat16() for key, value in side.items()} for side in (student, teacher)]
    rounded = [{key: value.float() for key, value in side.items()} for side in halves]
    assert all(torch.equal(a, b) for a, b in zip(method(*halves, batch).values(), method(*rounded, batch).values(), strict=True))
