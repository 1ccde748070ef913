"""Word predictions of which ``lm_kd`` has the likeliest words and the mass of the others in bands."""

import torch
from case import Case
from given import CLM, LLAMA, MLM, SMALL_LLAMA, Given, Reference, band_of
from torch import Tensor

from online.batch import TopBanded

WIDE = (SMALL_LLAMA, LLAMA)


def of_bands(bands: int, alpha: float | None = None) -> Reference:
    """KL over the kept words and the bands of the others, word by word; with ``alpha`` against the mixture with that share of p."""

    def reference(g: Given) -> dict[str, tuple[Tensor, float]]:
        s, t = g.S["lm_logits"], g.T["lm_logits"]
        assert isinstance(t, TopBanded)
        places = list(g.tokens()) if s.dim() == 3 else [(n,) for n in range(len(s))]
        total = torch.zeros((), dtype=torch.float64)
        for place in places:
            kept, words = t.ids[place].tolist(), s.shape[-1]
            q = torch.softmax(s[place], 0)
            events = [([word], t.log_probs[place][n].double().exp().item()) for n, word in enumerate(kept)]
            for band in range(bands):
                others = [word for word in range(words) if word not in kept and band_of(word, words, bands) == band]
                code = t.bands[place][band].item()
                events.append((others, 0.0 if code == 255 else torch.tensor(-code / 16, dtype=torch.float64).exp().item()))
            for members, p in events:
                if p > 0:
                    of_student = q[members].sum()
                    against = of_student if alpha is None else alpha * p + (1 - alpha) * of_student
                    total = total + p * (torch.tensor(p, dtype=torch.float64).log() - against.log())
        return {"words": (total, len(places))}

    return reference


CASES = {
    "lm_kd bands": Case("lm_kd", {"top": 3, "bands": 4}, of_bands(4), head=MLM, labels="tokens", zero=False),
    "lm_kd bands, all tokens": Case("lm_kd", {"top": 2, "bands": 3, "positions": "all"}, of_bands(3), head=CLM, sizes=WIDE, zero=False),
    "lm_kd bands, no other words": Case("lm_kd", {"top": 11, "bands": 2}, of_bands(2), head=MLM, labels="tokens", zero=False),
    "lm_kd bands, skew": Case(
        "lm_kd", {"top": 3, "bands": 4, "divergence": "skew_forward"}, of_bands(4, 0.1), head=MLM, labels="tokens", zero=False
    ),
}

CHANGES: list[tuple[str, dict[str, object]]] = [("lm_kd bands", {"bands": 1}), ("lm_kd bands", {"top": 5})]

MODELS = [
    ("lm_kd", {"top": 3, "bands": 4, "positions": "all"}, "llama", "causal_lm"),
    ("lm_kd", {"top": 2, "bands": 6}, "bert", "masked_lm"),
]

LIVE = [("lm_kd", "mlm", {"top": 3, "bands": 5}), ("lm_kd", "packed", {"top": 4, "bands": 9, "positions": "all"})]

RUNS = [("lm_kd", {"top": 2, "bands": 4})]
