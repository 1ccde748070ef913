"""Methods that learn from responses which the student writes: what they make of a response, whoever wrote it."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from case import Case, Options
from given import CLM, LLAMA, SMALL_LLAMA, Given, Reference
from torch import Tensor

from student_train.moment import Moment

RESPONSES = [[(0, 2), (1, 0)], [(2, 1)], [(3, 2), (4, 2)]]
"""Row by row, which of the batch's scored words they are, and the words themselves."""


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    if beta in (0, 1):
        return kl(p, q) if beta == 0 else kl(q, p)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def skewed(p: Tensor, q: Tensor, reverse: bool, alpha: float) -> Tensor:
    return kl(q, (1 - alpha) * p + alpha * q) if reverse else kl(p, alpha * p + (1 - alpha) * q)


def every_word(distance: Callable[[Tensor, Tensor], Tensor]) -> Reference:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        pairs = zip(g.T["lm_logits"].softmax(-1), g.S["lm_logits"].softmax(-1), strict=True)
        return {"words": (sum((distance(p, q) for p, q in pairs), torch.zeros(())), 5)}

    return reference


def minillm(mix: float, clip: float, length_norm: bool) -> Reference:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        p_all, q_all = g.T["lm_logits"].softmax(-1), g.S["lm_logits"].softmax(-1)
        single = long = torch.zeros((), dtype=torch.float64)
        for response in RESPONSES:
            rewards = [math.log(p_all[n, word].item() / q_all[n, word].item()) for n, word in response]
            for t, (n, word) in enumerate(response):
                p, q = p_all[n], q_all[n]
                weight = q[word] / (mix * p[word] + (1 - mix) * q[word].detach())
                single = single + weight.detach() * kl(q, p)
                later = rewards[t + 1 :]
                gain = sum(later) / (len(later) if length_norm and later else 1)
                clipped = weight.clamp(1 - clip, 1 + clip)
                long = long - (torch.minimum(weight * gain, clipped * gain))
        return {"single": (single, 5), "long": (long, 5)}

    return reference


def contrast(alpha: float, beta: float) -> Reference:
    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        pairs = list(zip(g.T["lm_logits"].softmax(-1), g.S["lm_logits"].softmax(-1), strict=True))
        given = sum((kl(p, alpha * p + (1 - alpha) * q) for p, q in pairs[:2]), torch.zeros(()))
        written = sum((kl(q, (1 - alpha) * p + alpha * q.detach()) for p, q in pairs[2:]), torch.zeros(()))
        return {"given": ((2 - beta) * given, 2), "written": (beta * written, 3)}

    return reference


def case(method: str, options: Options, reference: Reference, labels: str = "tokens") -> Case:
    return Case(method, options, reference, head=CLM, sizes=(SMALL_LLAMA, LLAMA), labels=labels)


CASES: dict[str, Case] = {
    "gkd": case("gkd", {}, every_word(partial(jsd, beta=0.5))),
    "gkd towards the reverse": case("gkd", {"beta": 0.9}, every_word(partial(jsd, beta=0.9))),
    "gkd forward": case("gkd", {"beta": 0.0}, every_word(partial(jsd, beta=0.0))),
    "gkd reverse": case("gkd", {"beta": 1.0}, every_word(partial(jsd, beta=1.0))),
    "minillm": case("minillm", {}, minillm(0.2, 0.2, True)),
    "minillm unclipped": case("minillm", {"clip": None, "mix": 0.6}, minillm(0.6, 1e9, True)),
    "minillm sums": case("minillm", {"length_norm": False, "mix": 0.0}, minillm(0.0, 0.2, False)),
    "distillm": case("distillm", {}, every_word(partial(skewed, reverse=True, alpha=0.1))),
    "distillm forward": case("distillm", {"skew": "forward", "alpha": 0.3}, every_word(partial(skewed, reverse=False, alpha=0.3))),
    "distillm2": case("distillm2", {}, contrast(0.1, 1.0), "answers"),
    "distillm2 risen": replace(
        case(
            "distillm2", {"alpha": 0.3, "beta": {"kind": "linear", "start": 1.0, "end": 1.5, "until": 0.5}}, contrast(0.3, 1.25), "answers"
        ),
        moment=Moment(step=10, steps=40, epoch_steps=10.0, seed=0),
    ),
    "distillm2 against": case("distillm2", {"beta": 1.4}, contrast(0.1, 1.4), "answers"),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
    ("gkd", {"beta": 0.2}),
    ("minillm", {"mix": 0.5}),
    ("minillm", {"clip": 0.01}),
    ("distillm", {"skew": "forward"}),
    ("distillm", {"alpha": 0.2}),
    ("distillm", {"capacity": 7}),
    ("distillm", {"longest": 16}),
    ("distillm2", {"alpha": 0.3}),
    ("distillm2", {"beta": 0.4}),
]

ELSEWHERE = [
    ("gkd", "lmbda"),
    ("gkd", "temperature"),
    ("gkd", "max_new_tokens"),
    ("minillm", "length_norm"),
    ("minillm", "max_new_tokens"),
    ("distillm", "share"),
    ("distillm", "every"),
    ("distillm", "temperature"),
    ("distillm", "max_new_tokens"),
    ("distillm2", "temperature"),
    ("distillm2", "max_new_tokens"),
]

MODELS = [
    ("gkd", {}, "llama", "causal_lm"),
    ("minillm", {}, "llama", "causal_lm"),
    ("distillm", {}, "llama", "causal_lm"),
    ("distillm2", {}, "llama", "causal_lm"),
]

LIVE = [
    ("gkd", "causal", {"beta": 0.3}),
    ("gkd", "packed", {}),
    ("minillm", "answers", {}),
    ("distillm", "answers", {}),
    ("distillm2", "answers", {}),
]
