"""LRC-BERT: COS-NCE in loops over rows, other rows and the token positions that two rows share."""

import torch
from case import Case
from given import BERT, LLAMA, SAME, SMALL_LLAMA, UNIFORM, Given, Reference, ref_cosine


def cos_nce(pairs: list[tuple[int, int]]) -> Reference:
    def reference(g: Given) -> dict[str, tuple[torch.Tensor, float]]:
        places = [{token for row, token in g.tokens() if row == one} for one in range(5)]
        total = torch.zeros((), dtype=torch.float64)
        for s, t in pairs:

            def far(i: int, j: int, s: int = s, t: int = t) -> torch.Tensor:
                shared = sorted(places[i] & places[j])
                return sum(ref_cosine(g.P["projection.weight"] @ g.S[f"hidden.{s}"][i, p], g.T[f"hidden.{t}"][j, p]) for p in shared) / len(
                    shared
                )

            for i in range(5):
                others = [j for j in range(5) if j != i and places[i] & places[j]]
                total = total + far(i, i) + sum((2 - (far(i, j) - far(i, i))) / 2 for j in others) / len(others)
        return {"contrast": (total, 5)}

    return reference


CASES: dict[str, Case] = {
    "lrc_bert": Case("lrc_bert", {}, cos_nce(UNIFORM), coupled=frozenset({"contrast"}), zero=False),
    "lrc_bert equal widths": Case(
        "lrc_bert",
        {"layers": [[0, 0], [2, 3]], "perturbation": False},
        cos_nce([(0, 0), (2, 3)]),
        sizes=(SAME, BERT),
        coupled=frozenset({"contrast"}),
        zero=False,
    ),
    "lrc_bert causal": Case(
        "lrc_bert", {"layers": "last"}, cos_nce([(2, 4)]), sizes=(SMALL_LLAMA, LLAMA), coupled=frozenset({"contrast"}), zero=False
    ),
}

CHANGES: list[tuple[str, dict[str, object]]] = [("lrc_bert", {"layers": "last"}), ("lrc_bert", {"perturbation": False})]

MODELS = [("lrc_bert", {}, "bert", "classification"), ("lrc_bert", {}, "llama", "causal_lm")]

LIVE = [("lrc_bert", "class", {}), ("lrc_bert", "mlm", {"layers": "last"}), ("lrc_bert", "causal", {"perturbation": False})]

RUNS = [("lrc_bert", {}), ("lrc_bert", {"perturbation": False})]
