"""Word predictions of which ``lm_kd`` has nuclei, or words drawn at random."""

import torch
from case import Case
from given import CLM, LLAMA, MLM, SMALL_LLAMA, Given, Reference
from torch import Tensor

from online.batch import Drawn, TopDrawn, TopK
from student_train.moment import Moment

WIDE = (SMALL_LLAMA, LLAMA)
LATER = Moment(step=7, steps=10, epoch_steps=2.0, seed=0)
"""In epoch 3."""


def places(g: Given) -> list[tuple[int, ...]]:
    return list(g.tokens()) if g.S["lm_logits"].dim() == 3 else [(n,) for n in range(len(g.S["lm_logits"]))]


def of_estimate(head: int, draws: int, number: int) -> Reference:
    """sum t^ log(t^ / q) over words that t^ has, from the draws of set ``number``: word by word."""

    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        s, t = g.S["lm_logits"], g.T["lm_logits"]
        assert isinstance(t, Drawn | TopDrawn)
        total = torch.zeros((), dtype=torch.float64)
        for place in places(g):
            shares: dict[int, float] = {}
            for n in range(head):
                shares[int(t.ids[place][n])] = t.log_probs[place][n].double().exp().item()
            for n in range(head + number * draws, head + (number + 1) * draws):
                if isinstance(t, Drawn):
                    share = t.counts[place][n].item() / draws
                    share *= t.log_weights[place][n].double().exp().item() if t.log_weights.shape[-1] else 1
                else:
                    share = t.log_tail[place].double().exp().item() / draws
                shares[int(t.ids[place][n])] = shares.get(int(t.ids[place][n]), 0) + share
            log_q = s[place] - s[place].exp().sum().log()
            for word, share in shares.items():
                if share > 0:
                    total = total + share * (torch.tensor(share, dtype=torch.float64).log() - log_q[word])
        return {"words": (total, len(places(g)))}

    return reference


def of_nucleus(temperature: float, ghost: bool) -> Reference:
    """KL over the words of each nucleus, with one word for all others or given that the word is one of these."""

    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        s, t = g.S["lm_logits"], g.T["lm_logits"]
        assert isinstance(t, TopK)
        total = torch.zeros((), dtype=torch.float64)
        for place in places(g):
            used = [n for n in range(t.ids.shape[-1]) if t.log_probs[place][n] > -1000]
            ids, p, q = t.ids[place][used].tolist(), t.log_probs[place][used].double().exp(), torch.softmax(s[place], 0)
            if ghost:
                others = [word for word in range(len(q)) if word not in ids]
                p, q = torch.cat([p, 1 - p.sum()[None]]), torch.cat([q[ids], q[others].sum()[None]])
            else:
                p, q = (side ** (1 / temperature) for side in (p, q[ids]))
                p, q = p / p.sum(), q / q.sum()
            total = total + temperature**2 * (p * (p / q).log()).sum()
        return {"words": (total, len(places(g)))}

    return reference


CASES = {
    "lm_kd nucleus": Case("lm_kd", {"top": 7, "nucleus": 0.8, "positions": "all"}, of_nucleus(1, True), head=CLM, sizes=WIDE),
    "lm_kd least": Case("lm_kd", {"top": 6, "nucleus": 0.3, "least": 2}, of_nucleus(1, True), head=MLM, labels="tokens"),
    "lm_kd nucleus, kept words": Case(
        "lm_kd", {"top": 6, "nucleus": 0.9, "tail": "none", "temperature": 2}, of_nucleus(2, False), head=MLM, labels="tokens"
    ),
    "lm_kd draws": Case("lm_kd", {"draws": 9}, of_estimate(0, 9, 0), head=MLM, labels="tokens", zero=False),
    "lm_kd draws, power": Case(
        "lm_kd", {"draws": 9, "tau": 0.8, "positions": "all"}, of_estimate(0, 9, 0), head=CLM, sizes=WIDE, zero=False
    ),
    "lm_kd draws, later": Case(
        "lm_kd", {"draws": 5, "samples": 2}, of_estimate(0, 5, 1), head=MLM, labels="tokens", zero=False, moment=LATER
    ),
    "lm_kd head and draws": Case(
        "lm_kd", {"top": 2, "draws": 5, "positions": "all"}, of_estimate(2, 5, 0), head=CLM, sizes=WIDE, zero=False
    ),
    "lm_kd head and draws, later": Case(
        "lm_kd", {"top": 3, "draws": 4, "samples": 4}, of_estimate(3, 4, 3), head=MLM, labels="tokens", zero=False, moment=LATER
    ),
}

CHANGES: list[tuple[str, dict[str, object]]] = [
    ("lm_kd nucleus", {"nucleus": 0.3}),
    ("lm_kd least", {"least": 5}),
    ("lm_kd draws", {"draws": 2}),
    ("lm_kd draws", {"tau": 0.5}),
    ("lm_kd draws, later", {"samples": 3}),
    ("lm_kd head and draws", {"top": 4}),
]

MODELS = [
    ("lm_kd", {"top": 3, "draws": 5, "positions": "all"}, "llama", "causal_lm"),
    ("lm_kd", {"draws": 9, "tau": 1.2}, "bert", "masked_lm"),
    ("lm_kd", {"top": 9, "nucleus": 0.7}, "bert", "masked_lm"),
]

LIVE = [
    ("lm_kd", "mlm", {"top": 3, "draws": 5}),
    ("lm_kd", "packed", {"top": 4, "draws": 9, "samples": 2, "positions": "all"}),
    ("lm_kd", "causal", {"draws": 20}),
    ("lm_kd", "modern", {"draws": 20, "tau": 0.8, "samples": 2}),
    ("lm_kd", "causal", {"top": 16, "nucleus": 0.6, "least": 2}),
]

RUNS = [("lm_kd", {"top": 2, "draws": 5, "samples": 3})]
