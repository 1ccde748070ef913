"""Word logits made small: the K likeliest words with the mass of all others, or chosen words with the log-sum-exp.

Shapes: M positions (the leading shape in one), V vocabulary, G groups of words, N candidates, K kept words, n chosen words.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from online.batch import IGNORED, Selected, TopK
from store.codecs.topk import UNUSED
from store.forms import WordForm

CHUNK, CHUNK_ON_GPU = 1 << 20, 1 << 24
"""Logits worked on at once: a few blocks of 4 MB beside them stay in a processor's caches, of 64 MB they keep a GPU busy. With blocks of
64 MB the 64 likeliest of 30,522 words take a CPU 1.8 times as long."""

GROUP = 16
"""Words that are first compared by the highest of them: this halves the time in which a CPU finds the 64 likeliest of 30,522."""


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
    found = []
    for chunk_MV in _chunks(logits):
        chunk_MV = chunk_MV.float()
        top_MK, ids_MK = likeliest(chunk_MV, k)
        rest_M = chunk_MV.scatter(-1, ids_MK, -torch.inf).logsumexp(-1)
        found.append(with_tail(top_MK, ids_MK, rest_M))
    lead = logits.shape[:-1]
    ids, log_probs, log_tail = (torch.cat(column) for column in zip(*found, strict=True))
    return TopK(ids.reshape(*lead, k), log_probs.reshape(*lead, k), log_tail.reshape(lead))


def with_tail(top_MK: Tensor, ids_MK: Tensor, rest_M: Tensor) -> TopK:
    """The likeliest words from their logits and the log-sum-exp of all others."""
    # torch.logaddexp rounds by a value's place in the tensor, so that a word's answer would depend on the batch.
    log_sum_exp_M = torch.stack([rest_M, top_MK.logsumexp(-1)], -1).logsumexp(-1)
    log_tail_M = (rest_M - log_sum_exp_M).clamp(min=torch.finfo(torch.float32).min)
    return TopK(ids_MK, top_MK - log_sum_exp_M[:, None], log_tail_M)


def nucleus(found: TopK, form: WordForm) -> TopK:
    """Of the likeliest words ``found`` [..., K] the fewest whose mass reaches ``form.nucleus``, and ``form.least`` at least.

    The mass of those that go is added to that of all others.
    """
    if form.nucleus == 1:
        return found
    probs = found.log_probs.double().exp()
    places = torch.arange(form.top, device=probs.device)
    kept = (probs.cumsum(-1) - probs < form.nucleus) | (places < form.least)
    lost = torch.cat([found.log_probs.masked_fill(kept, -torch.inf), found.log_tail[..., None]], -1)
    return TopK(found.ids * kept, found.log_probs.masked_fill(~kept, UNUSED), lost.logsumexp(-1))


def likeliest(logits_MV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` highest logits and their words, [M, K] each. ``torch.topk`` leaves open which of equal ones it takes."""
    top_MK, ids_MK = _highest(logits_MV, min(k + 1, logits_MV.shape[1]))
    tied_M = (top_MK[:, k - 1] == top_MK[:, -1]) & ~top_MK.isnan().any(-1)
    ids_MK = ids_MK[:, :k]
    if top_MK.shape[1] > k and tied_M.any():
        rows_MV, last_M1 = logits_MV[tied_M], top_MK[tied_M, k - 1, None]
        above_MV, equal_MV = rows_MV > last_M1, rows_MV == last_M1
        room_M1 = k - above_MV.sum(-1, keepdim=True)
        ids_MK[tied_M] = (above_MV | (equal_MV & (equal_MV.cumsum(-1) <= room_M1))).nonzero()[:, 1].reshape(-1, k)
    return by_logit(logits_MV.gather(-1, ids_MK), ids_MK)


def by_logit(logits_MN: Tensor, ids_MN: Tensor) -> tuple[Tensor, Tensor]:
    """Both in order of falling logits, of equal ones in order of rising ids."""
    ids_MN, order_MN = ids_MN.sort(-1)
    logits_MN, places_MN = logits_MN.gather(-1, order_MN).sort(stable=True, dim=-1, descending=True)
    return logits_MN, ids_MN.gather(-1, places_MN)


def _highest(logits_MV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``torch.topk``; on a CPU among the words of the ``k`` groups with the highest maxima: no other word is higher than all of these."""
    words = logits_MV.shape[1]
    groups = words // GROUP
    if logits_MV.is_cuda or groups < 2 * k:
        top = logits_MV.topk(k)
        return top.values, top.indices
    maxima_MG = logits_MV[:, : groups * GROUP].unflatten(1, (GROUP, groups)).amax(1)
    groups_MK = maxima_MG.topk(k, sorted=False).indices
    grouped_MN = (groups_MK[:, None] + groups * torch.arange(GROUP)[:, None]).flatten(1)
    others_MN = torch.arange(groups * GROUP, words).expand(len(logits_MV), -1)
    candidates_MN = torch.cat([grouped_MN, others_MN], 1)
    top_MK, place_MK = logits_MV.gather(1, candidates_MN).topk(k)
    return top_MK, candidates_MN.gather(1, place_MK)


def parts(logits: Tensor, rows: int) -> int:
    """Into how many parts of about equal size ``rows`` rows of ``logits`` [..., V] are best divided.

    No part is a single row where there are more: torch then sums it by several threads, which rounds differently.
    """
    at_once = max(3, (CHUNK_ON_GPU if logits.is_cuda else CHUNK) // logits.shape[-1])
    return max(1, -(-rows // at_once))


def _chunks(logits: Tensor) -> Sequence[Tensor]:
    """``logits`` [..., V] in parts [M, V]."""
    rows_MV = logits.reshape(-1, logits.shape[-1])
    return rows_MV.tensor_split(parts(rows_MV, len(rows_MV)))


def select(logits: Tensor, ids: Sequence[int], labels: Tensor) -> Selected:
    """Logits of the words ``ids`` and of each position's label, with the log-sum-exp of all words, float32.

    Args:
        logits: [..., V].
        labels: [...] int64 true words; the true logit is NaN where it is IGNORED.
    """
    chosen_n = torch.tensor(ids, dtype=torch.int64, pin_memory=logits.is_cuda).to(logits.device, non_blocking=True)
    true = logits.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1).float()
    log_sum_exp = torch.cat([chunk_MV.float().logsumexp(-1) for chunk_MV in _chunks(logits)]).reshape(labels.shape)
    return Selected(chosen_n, logits[..., chosen_n].float(), true.masked_fill(labels == IGNORED, torch.nan), log_sum_exp)
