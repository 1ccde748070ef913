"""Divergences of word predictions that ``lm_kd`` takes in place of its KL (logits.py has that one)."""

from collections.abc import Callable

import torch
from case import Case
from formulas import units_term
from given import CLM, LLAMA, MLM, SMALL_LLAMA, Given, Reference
from torch import Tensor

WIDE = (SMALL_LLAMA, LLAMA)
Distance = Callable[[Tensor, Tensor], Tensor]
"""Of the student's and the teacher's probabilities [V] of one token's words."""


def ref_sum(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q), word by word."""
    return sum((a * torch.log(a / b) for a, b in zip(p, q, strict=True)), torch.zeros((), dtype=torch.float64))


def ref_jsd(beta: float) -> Distance:
    def distance(q: Tensor, p: Tensor) -> Tensor:
        middle = beta * p + (1 - beta) * q
        return beta * ref_sum(p, middle) + (1 - beta) * ref_sum(q, middle)

    return distance


def ref_forward(alpha: float) -> Distance:
    return lambda q, p: ref_sum(p, alpha * p + (1 - alpha) * q)


def ref_reverse(alpha: float) -> Distance:
    return lambda q, p: ref_sum(q, (1 - alpha) * p + alpha * q)


def ref_adaptive(head: float) -> Distance:
    def distance(q: Tensor, p: Tensor) -> Tensor:
        before, gaps = 0.0, [0.0, 0.0]
        for word in sorted(range(len(p)), key=lambda word: -p[word].item()):
            gaps[before >= head] += abs(p[word].item() - q[word].item())
            before += p[word].item()
        return (gaps[0] * ref_sum(p, q) + gaps[1] * ref_sum(q, p)) / sum(gaps)

    return distance


def ref_variation(q: Tensor, p: Tensor) -> Tensor:
    return sum((abs(a - b) for a, b in zip(p, q, strict=True)), torch.zeros((), dtype=torch.float64)) / 2


def ref_centred(s: Tensor, t: Tensor) -> Tensor:
    """Of logits themselves."""
    s, t = s - s.sum() / len(s), t - t.sum() / len(t)
    return ((s - t) ** 2).sum() / len(s)


def words(distance: Distance, temperature: float = 1, factor: float = 1, at: str = "labels") -> Reference:
    def of_logits(s: Tensor, t: Tensor) -> Tensor:
        return factor * distance(torch.softmax(s / temperature, 0), torch.softmax(t / temperature, 0))

    return units_term("words", "lm_logits", of_logits, at)


def kept_words(distance: Distance, temperature: float, factor: float, ghost: bool) -> Reference:
    """Of the teacher's likeliest words: with one word for all others, or among themselves."""

    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        s, t = g.S["lm_logits"], g.T["lm_logits"]
        total = torch.zeros((), dtype=torch.float64)
        for n in range(len(s)):
            ids = t.ids[n].tolist()
            p, q = t.log_probs[n].double().exp(), torch.softmax(s[n], 0)
            if ghost:
                others = [word for word in range(len(q)) if word not in ids]
                total = total + factor * distance(torch.cat([q[ids], q[others].sum()[None]]), torch.cat([p, 1 - p.sum()[None]]))
            else:
                shares = [side ** (1 / temperature) for side in (q[ids], p)]
                total = total + factor * distance(shares[0] / shares[0].sum(), shares[1] / shares[1].sum())
        return {"words": (total, len(s))}

    return reference


def case(divergence: str, reference: Reference, **options: object) -> Case:
    """Over every token of causal rows, or over the labelled ones of masked rows."""
    options = {"divergence": divergence} | options
    if options.get("positions") == "all":
        return Case("lm_kd", options, reference, head=CLM, sizes=WIDE)
    return Case("lm_kd", options, reference, head=MLM, labels="tokens")


CASES: dict[str, Case] = {
    "lm_kd reverse": case("reverse_kl", words(lambda q, p: ref_sum(q, p))),
    "lm_kd reverse, warm": case("reverse_kl", words(lambda q, p: ref_sum(q, p), 2, 4, "all"), temperature=2, positions="all"),
    "lm_kd jsd": case("jsd", words(ref_jsd(0.5))),
    "lm_kd jsd, warm": case("jsd", words(ref_jsd(0.3), 2, 4, "all"), beta=0.3, temperature=2, positions="all"),
    "lm_kd jsd, end": case("jsd", words(lambda q, p: ref_sum(q, p)), beta=1),
    "lm_kd skew forward": case("skew_forward", words(ref_forward(0.1))),
    "lm_kd skew forward, warm": case("skew_forward", words(ref_forward(0.4), 3, 9, "all"), alpha=0.4, temperature=3, positions="all"),
    "lm_kd skew forward ghost": case("skew_forward", kept_words(ref_forward(0.1), 1, 1, True), top=4),
    "lm_kd skew forward kept words": case(
        "skew_forward", kept_words(ref_forward(0.2), 2, 4, False), alpha=0.2, top=4, tail="none", temperature=2
    ),
    "lm_kd skew reverse": case("skew_reverse", words(ref_reverse(0.1))),
    "lm_kd skew reverse, warm": case("skew_reverse", words(ref_reverse(0.4), 3, 9, "all"), alpha=0.4, temperature=3, positions="all"),
    "lm_kd adaptive": case("adaptive_kl", words(ref_adaptive(0.5))),
    "lm_kd adaptive, warm": case("adaptive_kl", words(ref_adaptive(0.8), 2, 4, "all"), head=0.8, temperature=2, positions="all"),
    "lm_kd variation": case("total_variation", words(ref_variation)),
    "lm_kd variation, warm": case("total_variation", words(ref_variation, 3, 3, "all"), temperature=3, positions="all"),
    "lm_kd mse": case("mse", units_term("words", "lm_logits", ref_centred, "labels")),
    "lm_kd mse everywhere": case("mse", units_term("words", "lm_logits", ref_centred, "all"), positions="all"),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
    *(("lm_kd reverse", {"divergence": other}) for other in ("forward_kl", "jsd", "skew_reverse", "adaptive_kl", "total_variation", "mse")),
    ("lm_kd jsd", {"beta": 0.9}),
    ("lm_kd skew forward", {"alpha": 0}),
    ("lm_kd skew forward ghost", {"alpha": 0.3}),
    ("lm_kd skew reverse", {"alpha": 0.3}),
    ("lm_kd adaptive", {"head": 0.1}),
    ("lm_kd variation", {"temperature": 2}),
]

MODELS = [
    ("lm_kd", {"divergence": "adaptive_kl", "temperature": 2.0}, "bert", "masked_lm"),
    ("lm_kd", {"divergence": "skew_reverse", "positions": "all"}, "llama", "causal_lm"),
    ("lm_kd", {"divergence": "mse"}, "llama", "causal_lm"),
]

LIVE = [
    ("lm_kd", "mlm", {"divergence": "jsd", "temperature": 2.0}),
    ("lm_kd", "causal", {"divergence": "reverse_kl", "positions": "all"}),
    ("lm_kd", "causal", {"divergence": "skew_forward", "top": 8}),
]
