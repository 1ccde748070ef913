"""DIITO: a small BERT by hand whose rows take each other's hidden states, with gradient into these."""

import torch
from by_hand import bert, weights_of
from case import Case
from given import BERT, MLM, Given, Reference, ref_ce, ref_cosine, ref_kl
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from online.models import LoadedModel
from student_train.methods.base import Method

SIZES = BERT | dict(layers=2, windows=(None, None))


def student() -> LoadedModel:
    config = BertConfig(
        vocab_size=11, hidden_size=12, num_hidden_layers=2, num_attention_heads=4, intermediate_size=10, max_position_embeddings=16,
        attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        model = BertForMaskedLM(config).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.2)
    return LoadedModel.of(model, "masked_lm")


def running(method: Method) -> None:
    method.running_student = student()


def diito(
    blocks: list[int], temperature: float, causal: tuple[float, float], rest: tuple[float, float, float], bases: list[int]
) -> Reference:
    """``blocks``: student block of each alternative; ``causal``: weights of the KL and the cosine; ``rest``: of KL, labels, cosine."""

    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        zero = torch.zeros((), dtype=torch.float64)
        soft, far, soft_after, far_after, weights = zero, zero, zero, zero, weights_of(student().model)
        ce, mlm, cos = rest
        for row, token in g.tokens():
            if ce:
                soft = soft + ref_kl(g.S["lm_logits"][row, token], g.T["first/lm_logits"][row, token], temperature)
            far = far + ref_cosine(g.S["final"][row, token], g.T["first/final"][row, token])
        assert g.batch.interchange is not None
        assert g.batch.draws is not None
        for row in bases:
            places = [token for r, token in g.tokens() if r == row]
            block = blocks[int(g.batch.draws[row]) % len(blocks)]
            partner = {0: 1, 1: 0, 2: 3, 3: 2, 4: 4}[row]
            taken = {
                token - places[0]: g.S[f"hidden.{block}"][partner, int(g.batch.interchange[row, token])]
                for token in places
                if g.batch.interchange[row, token] >= 0
            }
            ids = g.batch.input_ids[row, places].tolist()
            hidden, logits = bert(weights, 4, 2, ids, {block: taken})
            for place, token in enumerate(places):
                if causal[0]:
                    soft_after = soft_after + ref_kl(logits[place], g.T["second/lm_logits"][row, token], temperature)
                if causal[1]:
                    far_after = far_after + ref_cosine(hidden[2][place], g.T["second/final"][row, token])
        count = sum(row in bases for row, _ in g.tokens())
        scored = {n: label for n, label in enumerate([2, 0, 1, 2, 2]) if mlm}
        labels = sum((ref_ce(g.S["lm_logits@labels" if ce else "lm_logits"][n], label) for n, label in scored.items()), zero)
        found = {"ce": (ce * soft, 19), "mlm": (mlm * labels, 5), "cos": (cos * far, 19)}
        found |= {"causal_ce": (causal[0] * soft_after, count), "causal_cos": (causal[1] * far_after, count)}
        return {term: pair for term, pair in found.items() if {"ce": ce, "mlm": mlm, "cos": cos}.get(term, causal[term != "causal_ce"])}

    return reference


NAMES = {"factual": "first", "counterfactual": "second"}
ALL = list(range(5))


def case(options: dict[str, object], reference: Reference) -> Case:
    return Case(
        "diito", NAMES | options, reference, MLM, (SIZES, BERT), "pairs", others={"second": BERT}, zero=False, set_up=running
    )  # fmt: skip


CASES = {
    "diito": case({}, diito([1, 2], 2.0, (0.25, 0), (0.25, 0.25, 0.25), ALL)),
    "diito cosines": case(
        {"layers": [[2, 3], [1, [1, 2]]], "temperature": 1.5, "alpha_ce": 2, "alpha_mlm": 0, "alpha_causal_ce": 0.5, "alpha_causal_cos": 3},
        diito([2, 1], 1.5, (0.5, 3), (2, 0, 1 / 4), ALL),
    ),
    "diito first rows": case(
        {"layers": "middle", "crossway": False, "alpha_causal_ce": 0, "alpha_causal_cos": 1, "alpha_ce": 0},
        diito([1], 2.0, (0, 1), (0, 0.25, 0.25), [0, 2, 4]),
    ),
}
LIVE = [
    ("diito", "pairs", NAMES | {"alpha_causal_cos": 0.5}),
    ("diito", "pairs", NAMES | {"layers": [[1, 4], [2, 1], [2, [2, 3]]], "alpha_ce": 0, "crossway": False}),
]
CHANGES = [
    ("diito", {"layers": [[1, 2]]}),
    ("diito", {"temperature": 1.0}),
    ("diito", {"alpha_ce": 1}),
    ("diito", {"alpha_mlm": 1}),
    ("diito", {"alpha_cos": 1}),
    ("diito", {"alpha_causal_ce": 1}),
    ("diito", {"alpha_causal_cos": 1}),
    ("diito", {"crossway": False}),
    ("diito", {"factual": "second", "counterfactual": "first"}),
]
