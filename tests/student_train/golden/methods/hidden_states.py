"""Hidden states and sentence vectors."""

from case import Case
from formulas import hidden, similarity, together, tokens_term, units_term
from given import BERT, LAST, LLAMA, SAME, SMALL_LLAMA, UNIFORM, ref_cosine, ref_mse

CASES: dict[str, Case] = {
    "hid_cls": Case("hid_cls", {}, lambda g: {"hidden": (hidden(UNIFORM, "projection", False)(g), 5)}),
    "hid_cls equal widths": Case(
        "hid_cls", {"layers": [[0, 0], [2, 1]]}, lambda g: {"hidden": (hidden([(0, 0), (2, 1)], None, False)(g), 5)}, sizes=(SAME, BERT)
    ),
    "hid_seq": Case("hid_seq", {}, tokens_term("hidden", hidden(UNIFORM, "projection", True)), sizes=(SMALL_LLAMA, LLAMA)),
    "hid_seq last": Case("hid_seq", {"layers": "last"}, tokens_term("hidden", hidden(LAST, None, True)), sizes=(SAME, BERT)),
    "sentence": Case(
        "sentence",
        {"mse": 2, "similarity": 3},
        together(
            units_term("cosine", "final", ref_cosine, "mean", "projection"),
            units_term("mse", "final", ref_mse, "mean", "projection", 2),
            similarity,
        ),
        coupled=frozenset({"similarity"}),
    ),
    "sentence hidden": Case(
        "sentence",
        {"pooling": "last", "student_layer": 1, "teacher_layer": 0},
        units_term("cosine", "hidden.1", ref_cosine, "last", t_site="hidden.0"),
        sizes=(SAME, BERT),
    ),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
    ("hid_cls", {"layers": "last"}),
    ("hid_cls", {"positions": "last"}),
    ("hid_seq", {"layers": [[1, 1]]}),
    ("sentence", {"pooling": "first"}),
    ("sentence", {"student_layer": 1}),
    ("sentence", {"teacher_layer": 1}),
    ("sentence", {"cosine": 0}),
    ("sentence", {"mse": 0}),
    ("sentence", {"similarity": 0}),
]

MODELS = [
    ("hid_cls", {}, "llama", "causal_lm"),
    ("hid_seq", {}, "bert", "masked_lm"),
    ("sentence", {"mse": 1, "similarity": 1}, "bert", "masked_lm"),
]

LIVE = [
    ("hid_cls", "class", {}),
    ("hid_cls", "causal", {}),
    ("hid_seq", "mlm", {}),
    ("hid_seq", "packed", {"layers": [(0, 0), (2, 3)]}),
    ("sentence", "mlm", {"mse": 1.0, "similarity": 1.0}),
    ("sentence", "causal", {"pooling": "last"}),
]

RUNS = [
    ("sentence", {"cosine": 0, "similarity": 1}),
    ("hid_cls", {}),
    ("hid_seq", {}),
]
