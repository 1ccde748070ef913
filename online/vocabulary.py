"""Word logits made small: the K likeliest words with the mass of all others, or chosen words with the log-sum-exp.

Shapes: M positions (the leading shape in one), V vocabulary, K kept words, n chosen words.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from online.batch import IGNORED, Selected, TopK

CHUNK = 1 << 24
"""Logits worked on at once: bounds what is needed beside them to a few 64 MB blocks."""


def top_k(logits: Tensor, k: int) -> TopK:
    """The ``k`` likeliest words of ``logits`` [..., V] with exact tail mass, float32.

    Equal logits count by rising id. The mass of the other words is summed over them, not taken as what the kept ones
    leave of 1: that difference has no correct digits where the kept words hold nearly everything.

    Raises:
        ValueError: the vocabulary has fewer than ``k`` words.
    """
    words = logits.shape[-1]
    if k > words:
        raise ValueError(f"top{k}: the vocabulary has {words} words")
    parts = []
    for chunk_MV in logits.reshape(-1, words).split(max(1, CHUNK // words)):
        chunk_MV = chunk_MV.float()
        top_MK, ids_MK = _likeliest(chunk_MV, k)
        rest_M = chunk_MV.scatter(-1, ids_MK, -torch.inf).logsumexp(-1)
        # torch.logaddexp rounds by a value's place in the tensor, so that a word's answer would depend on the batch.
        log_sum_exp_M = torch.stack([rest_M, top_MK.logsumexp(-1)], -1).logsumexp(-1)
        log_tail_M = (rest_M - log_sum_exp_M).clamp(min=torch.finfo(torch.float32).min)
        parts.append(TopK(ids_MK, top_MK - log_sum_exp_M[:, None], log_tail_M))
    lead = logits.shape[:-1]
    ids, log_probs, log_tail = (torch.cat(column) for column in zip(*parts, strict=True))
    return TopK(ids.reshape(*lead, k), log_probs.reshape(*lead, k), log_tail.reshape(lead))


def _likeliest(logits_MV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` highest logits and their words, [M, K] each. ``torch.topk`` leaves open which of equal ones it takes."""
    top_MK, ids_MK = logits_MV.topk(min(k + 1, logits_MV.shape[1]))
    tied_M = (top_MK[:, k - 1] == top_MK[:, -1]) & ~top_MK.isnan().any(-1)
    ids_MK = ids_MK[:, :k]
    if top_MK.shape[1] > k and tied_M.any():
        rows_MV, last_M1 = logits_MV[tied_M], top_MK[tied_M, k - 1, None]
        above_MV, equal_MV = rows_MV > last_M1, rows_MV == last_M1
        room_M1 = k - above_MV.sum(-1, keepdim=True)
        ids_MK[tied_M] = (above_MV | (equal_MV & (equal_MV.cumsum(-1) <= room_M1))).nonzero()[:, 1].reshape(-1, k)
    ids_MK = ids_MK.sort(-1).values
    top_MK, order_MK = logits_MV.gather(-1, ids_MK).sort(stable=True, dim=-1, descending=True)
    return top_MK, ids_MK.gather(-1, order_MK)


def select(logits: Tensor, ids: Sequence[int], labels: Tensor) -> Selected:
    """Logits of the words ``ids`` and of each position's label, with the log-sum-exp of all words, float32.

    Args:
        logits: [..., V].
        labels: [...] int64 true words; the true logit is NaN where it is IGNORED.
    """
    chosen_n = torch.tensor(ids, dtype=torch.int64, device=logits.device)
    words = logits.shape[-1]
    true = logits.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1).float()
    chunks = logits.reshape(-1, words).split(max(1, CHUNK // words))
    log_sum_exp = torch.cat([chunk_MV.float().logsumexp(-1) for chunk_MV in chunks]).reshape(labels.shape)
    return Selected(chosen_n, logits[..., chosen_n].float(), true.masked_fill(labels == IGNORED, torch.nan), log_sum_exp)
