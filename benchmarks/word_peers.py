"""What other tools keep of a word prediction, and the loss that they learn from it: their formulas in a few lines, or their own code.

Shapes: M tokens, V words, K kept words.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Loss = Callable[[Tensor], Tensor]
"""[M] the loss of each token from a student's logits [M, V]."""


@dataclass(frozen=True)
class Kept:
    """What a peer keeps of some tokens' predictions."""

    bytes: float
    """Of a token."""
    losses: dict[str, Loss]
    """By what becomes of words that are not kept."""
    implied: Tensor
    """[M, V] the distribution that it stands for: what is not kept has the rest of the mass, evenly."""


def without_tail(ids_MK: Tensor, log_t_MK: Tensor) -> Loss:
    """The teacher's kept words alone against the student's full softmax, teacher not renormalised: sum_K t (log t - log p)."""

    def loss(logits_MV: Tensor) -> Tensor:
        log_p_MK = logits_MV.log_softmax(-1).gather(-1, ids_MK)
        return (log_t_MK.exp() * (log_t_MK - log_p_MK)).sum(-1)

    return loss


def ghost(ids_MK: Tensor, log_t_MK: Tensor) -> Loss:
    """All words that are not kept as one more word, whose mass is what the kept ones leave of 1."""

    def loss(logits_MV: Tensor) -> Tensor:
        log_p_MK = logits_MV.log_softmax(-1).gather(-1, ids_MK)
        t_tail_M, p_tail_M = (1 - log.exp().sum(-1) for log in (log_t_MK, log_p_MK))
        t_tail_M, p_tail_M = t_tail_M.clamp(1e-8, 1), p_tail_M.clamp(1e-8, 1)
        return (log_t_MK.exp() * (log_t_MK - log_p_MK)).sum(-1) + t_tail_M * (t_tail_M.log() - p_tail_M.log())

    return loss


def spread(ids_MK: Tensor, log_t_MK: Tensor, words: int) -> Tensor:
    """[M, V] the kept words' probabilities, and what they leave of 1 evenly over the others."""
    t_MK = log_t_MK.exp()
    rest_M1 = (1 - t_MK.sum(-1, keepdim=True)).clamp(min=1e-8) / (words - ids_MK.shape[-1])
    implied_MV = rest_M1.expand(-1, words).scatter(-1, ids_MK, t_MK)
    return implied_MV / implied_MV.sum(-1, keepdim=True)


def megatron(logits_MV: Tensor, k: int) -> Kept:
    """Megatron-LM's offline format: fp16 log-probabilities of the K likeliest words under all words, ids in 17 bits (pull request 5019)."""
    log_t_MK, ids_MK = logits_MV.log_softmax(-1).topk(k, -1)
    log_t_MK = log_t_MK.half().float()
    losses = {"no tail": without_tail(ids_MK, log_t_MK), "ghost": ghost(ids_MK, log_t_MK)}
    return Kept(k * (2 + 17 / 8), losses, spread(ids_MK, log_t_MK, logits_MV.shape[-1]))


def distillkit(folder: Path, logits_MV: Tensor, k: int, exact: int, terms: list[Any], term_type: str, normalize_t: bool) -> Kept:
    """DistillKit's compressor, the code in ``folder``, on the CPU as when it captures."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    from distillkit.compression.compressor import LogprobCompressor
    from distillkit.compression.config import DistributionQuantizationConfig

    words = logits_MV.shape[-1]
    config = DistributionQuantizationConfig(
        d=words,
        k=k,
        exact_k=exact,
        exact_dtype="bfloat16",
        polynomial_terms=terms,
        term_dtype=term_type,
        residual_bins=[],
        delta_encoding=False,
        normalize_t=normalize_t,
    )
    compressor = LogprobCompressor(config=config)
    kept = compressor.compress(logits_MV.log_softmax(-1)[None])
    ids_MK, log_t_MK = (part[0] for part in compressor.decompress_to_sparse(kept))
    log_t_MK = log_t_MK.float()
    # "no tail" is what it does by default: the teacher renormalised over the kept words, the student over all.
    losses = {"no tail": without_tail(ids_MK, log_t_MK.log_softmax(-1)), "ghost": ghost(ids_MK, log_t_MK)}
    return Kept(config.total_bits() / 8, losses, spread(ids_MK, log_t_MK, words))


def random_sampling(logits_MV: Tensor, draws: int) -> Kept:
    """RS-KD (Anshumann et al. 2025, arXiv 2503.16870) by its description, 17 bits for a word and 7 for its count; no code was published."""
    t_MV = logits_MV.softmax(-1)
    ids_MN = torch.multinomial(t_MV, draws, replacement=True)
    estimate_MV = torch.zeros_like(t_MV).scatter_add_(-1, ids_MN, torch.full(ids_MN.shape, 1 / draws))

    def loss(logits_MV: Tensor) -> Tensor:
        return -(estimate_MV * logits_MV.log_softmax(-1)).sum(-1)

    distinct = float((estimate_MV > 0).sum(-1).float().mean())
    return Kept(3 * distinct, {"": loss}, estimate_MV)
