"""Attention, relations and the generic method."""

from case import Case
from formulas import hidden, kl_at, maps, pairs_term, soft_ce, together, tokens_term, units_term
from given import BERT, CLASSES, LAST, LLAMA, MLM, PAIRS, SAME, SMALL_LLAMA, UNIFORM, ref_cosine, ref_huber, ref_kl, ref_mse, squares

CASES: dict[str, Case] = {
    "att_mse": Case("att_mse", {}, pairs_term("attention", UNIFORM, maps(UNIFORM, "attention_scores", squares))),
    "att_mse causal": Case(
        "att_mse",
        {"layers": PAIRS},
        pairs_term("attention", [(2, 3), (1, 1)], maps([(2, 3), (1, 1)], "attention_scores", squares)),
        sizes=(SMALL_LLAMA, LLAMA),
    ),
    "att_kl": Case("att_kl", {}, tokens_term("attention", maps(UNIFORM, "attention_scores", ref_kl))),
    "att_kl causal": Case("att_kl", {}, tokens_term("attention", maps(UNIFORM, "attention_scores", ref_kl)), sizes=(SMALL_LLAMA, LLAMA)),
    "val_kl": Case("val_kl", {}, tokens_term("value", maps(UNIFORM, "value", ref_kl, 4))),
    "val_kl causal": Case(
        "val_kl", {"layers": PAIRS}, tokens_term("value", maps([(2, 3), (1, 1)], "value", ref_kl, 2)), sizes=(SMALL_LLAMA, LLAMA)
    ),
    "minilm": Case(
        "minilm",
        {"value": 0.5},
        together(
            tokens_term("attention", maps(LAST, "attention_scores", ref_kl)), tokens_term("value", maps(LAST, "value", ref_kl, 4, 0.5))
        ),
    ),
    "minilm causal": Case(
        "minilm",
        {"attention": 2},
        together(
            tokens_term("attention", maps(LAST, "attention_scores", ref_kl, 0, 2)), tokens_term("value", maps(LAST, "value", ref_kl, 2))
        ),
        sizes=(SMALL_LLAMA, LLAMA),
    ),
    "minilmv2": Case("minilmv2", {}, together(*(tokens_term(x, maps(LAST, x, ref_kl, 4)) for x in ("query", "key", "value")))),
    "minilmv2 causal": Case(
        "minilmv2",
        {"layers": [[2, 3]], "relation_heads": 2, "key": 0.3},
        together(*(tokens_term(x, maps([(2, 3)], x, ref_kl, 2, 0.3 if x == "key" else 1)) for x in ("query", "key", "value"))),
        sizes=(SMALL_LLAMA, LLAMA),
    ),
    "tinybert": Case(
        "tinybert",
        {"embedding": 2, "hidden": 0.5, "attention": 3},
        together(
            tokens_term("embedding", lambda g: 2 * hidden([(0, 0)], "embedding_projection", True)(g)),
            tokens_term("hidden", lambda g: 0.5 * hidden(UNIFORM, "hidden_projection", True)(g)),
            pairs_term("attention", UNIFORM, maps(UNIFORM, "attention_scores", squares, 0, 3)),
        ),
    ),
    "match hidden": Case(
        "match",
        {"site": "hidden", "layers": [[2, 3]], "projection": "linear"},
        units_term("hidden", "hidden.2", ref_mse, "all", "projections.0", t_site="hidden.3"),
    ),
    "match embedding": Case(
        "match",
        {"site": "hidden", "layers": [[0, 0]], "distance": "cosine"},
        units_term("hidden", "hidden.0", ref_cosine, "all"),
        sizes=(SAME, BERT),
    ),
    "match final": Case(
        "match",
        {"site": "final", "positions": "mean", "distance": "huber"},
        units_term("final", "final", ref_huber, "mean"),
        sizes=(SAME, BERT),
    ),
    "match words": Case(
        "match",
        {"site": "lm_logits", "positions": "labels", "distance": "kl", "temperature": 0.5},
        units_term("lm_logits", "lm_logits", kl_at(0.5), "labels"),
        head=MLM,
        sizes=(SAME, BERT),
        labels="tokens",
    ),
    "match task": Case(
        "match",
        {"site": "task_logits", "distance": "ce", "temperature": 2},
        units_term("task_logits", "task_logits", soft_ce(2), "row"),
        head=CLASSES,
        sizes=(SAME, BERT),
        labels="classes",
        zero=False,
    ),
    "match head input": Case(
        "match",
        {"site": "head_input", "projection": "linear", "distance": "huber"},
        units_term("head_input", "head_input", ref_huber, "all", "projections.0"),
        head=MLM,
    ),
    "match query": Case(
        "match",
        {"site": "query", "projection": "linear", "layers": "last"},
        units_term("query", "query.2", ref_mse, "all", "projections.0", t_site="query.4"),
        sizes=(SMALL_LLAMA, LLAMA),
    ),
    "match scores kl": Case(
        "match",
        {"site": "attention_scores", "distance": "kl", "temperature": 0.5},
        tokens_term("attention_scores", maps(UNIFORM, "attention_scores", kl_at(0.5))),
        sizes=(SMALL_LLAMA, LLAMA),
    ),
    "match scores ce": Case(
        "match",
        {"site": "attention_scores", "distance": "ce", "temperature": 2},
        tokens_term("attention_scores", maps(UNIFORM, "attention_scores", soft_ce(2))),
        zero=False,
    ),
    "match scores cosine": Case(
        "match",
        {"site": "attention_scores", "distance": "cosine"},
        tokens_term("attention_scores", maps(UNIFORM, "attention_scores", ref_cosine)),
    ),
    "match scores huber": Case(
        "match",
        {"site": "attention_scores", "distance": "huber"},
        pairs_term("attention_scores", UNIFORM, maps(UNIFORM, "attention_scores", lambda s, t: len(s) * ref_huber(s, t))),
    ),
    "match probs": Case(
        "match", {"site": "attention_probs"}, pairs_term("attention_probs", UNIFORM, maps(UNIFORM, "attention_probs", squares))
    ),
    "match relation": Case(
        "match",
        {"site": "hidden", "form": "relation", "distance": "kl"},
        tokens_term("hidden", maps(UNIFORM, "hidden", ref_kl, 1)),
        sizes=(SMALL_LLAMA, LLAMA),
    ),
    "match final relation": Case(
        "match", {"site": "final", "form": "relation"}, pairs_term("final", LAST, maps(LAST, "final", squares, 1))
    ),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
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
    ("match hidden", {"site": "value"}),
    ("match final", {"distance": "mse"}),
    ("match hidden", {"layers": "last"}),
    ("match final", {"positions": "last"}),
    ("match final relation", {"form": "values", "projection": "linear"}),
    ("match words", {"temperature": 1}),
]

MODELS = [
    ("att_mse", {}, "llama", "causal_lm"),
    ("att_kl", {}, "bert", "masked_lm"),
    ("val_kl", {}, "llama", "causal_lm"),
    ("minilm", {}, "llama", "causal_lm"),
    ("minilmv2", {}, "bert", "masked_lm"),
    ("minilmv2", {}, "llama", "causal_lm"),
    ("tinybert", {}, "bert", "masked_lm"),
    ("match", {"site": "head_input", "projection": "linear"}, "llama", "causal_lm"),
    ("match", {"site": "attention_probs", "distance": "cosine"}, "llama", "causal_lm"),
    ("match", {"site": "input", "form": "relation", "distance": "kl"}, "llama", "causal_lm"),
]

LIVE = [
    ("att_mse", "class", {}),
    ("att_mse", "causal", {"layers": "last"}),
    ("att_kl", "mlm", {}),
    ("att_kl", "packed", {}),
    ("val_kl", "causal", {}),
    ("minilm", "mlm", {}),
    ("minilm", "modern", {"layers": "last"}),
    ("minilmv2", "mlm", {"relation_heads": 8}),
    ("minilmv2", "packed", {}),
    ("tinybert", "mlm", {}),
    ("match", "mlm", {"site": "value", "form": "relation", "distance": "kl"}),
    ("match", "packed", {"site": "query", "projection": "linear", "distance": "cosine"}),
    ("match", "modern", {"site": "attention_probs", "distance": "huber"}),
    ("match", "causal", {"site": "lm_logits", "distance": "ce"}),
]

RUNS = [
    ("att_mse", {}),
    ("att_kl", {}),
    ("val_kl", {}),
    ("minilm", {}),
    ("minilmv2", {}),
    ("tinybert", {}),
    ("match", {"site": "hidden"}),
]
