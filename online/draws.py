"""The torch half of the codecs ``draw`` and ``topdraw``: words drawn on the device, beside the forward pass.

What is drawn for a token depends on its logits and its seed alone (online.seeds), so that a store and a live teacher draw alike.

Logits are float32. Shapes: M tokens, V words, H head words, D sets of draws, N draws of a set, P = D * N places.
"""

import torch
from torch import Tensor

from online.batch import Drawn, TopDrawn
from online.seeds import uniforms
from online.vocabulary import top_k
from store.codecs.draw import MASS
from store.codecs.topk import UNUSED
from store.forms import WordForm


def drawn(logits_MV: Tensor, seeds_M: Tensor, form: WordForm) -> Drawn:
    """``drawN``: as store.codecs.draw says; counts are NaN where a logit is, or none is finite."""
    scaled_MV = logits_MV * form.tau
    words_MP = _chosen(scaled_MV, uniforms(seeds_M, form.drawn))
    sorted_MDN = words_MP.unflatten(1, (form.samples, form.draws)).sort(-1).values
    first_MDN = torch.ones_like(sorted_MDN, dtype=torch.bool)
    first_MDN[..., 1:] = sorted_MDN[..., 1:] != sorted_MDN[..., :-1]
    place_MDN = first_MDN.cumsum(-1) - 1
    ids_MP = torch.zeros_like(sorted_MDN).scatter_(-1, place_MDN, sorted_MDN).flatten(1)
    counts_MDN = torch.zeros_like(sorted_MDN).scatter_add_(-1, place_MDN, torch.ones_like(sorted_MDN))
    finite_M1 = logits_MV.amax(-1, keepdim=True).isfinite()
    counts_MP = counts_MDN.flatten(1).float().masked_fill(~finite_M1, torch.nan)
    if form.tau == 1:
        return Drawn(ids_MP, counts_MP, logits_MV.new_empty(len(logits_MV), 0))
    log_t_MP = logits_MV.gather(-1, ids_MP) - logits_MV.logsumexp(-1, keepdim=True)
    log_q_MP = scaled_MV.gather(-1, ids_MP) - scaled_MV.logsumexp(-1, keepdim=True)
    return Drawn(ids_MP, counts_MP, (log_t_MP - log_q_MP).masked_fill(counts_MP == 0, 0))


def top_drawn(logits_MV: Tensor, seeds_M: Tensor, form: WordForm) -> TopDrawn:
    """``topHdrawM``: as store.codecs.topdraw says."""
    head = top_k(logits_MV, form.top)
    others_MV = logits_MV.scatter(-1, head.ids, -torch.inf)
    points_MP = ((uniforms(seeds_M, form.samples)[..., None] + torch.arange(form.draws, device=seeds_M.device)) / form.draws).flatten(1)
    ids = torch.cat([head.ids, _chosen(others_MV, points_MP)], -1)
    return TopDrawn(ids, head.log_probs, head.log_tail.clamp(min=UNUSED))


def _chosen(scores_MV: Tensor, points_MP: Tensor) -> Tensor:
    """[M, P] the words at ``points_MP``, between 0 and 1, of the running sum of softmax(scores)."""
    highest_M1 = scores_MV.amax(-1, keepdim=True).clamp(min=torch.finfo(scores_MV.dtype).min)
    running_MV = (scores_MV - highest_M1).exp_().mul_(MASS).long().cumsum(-1)
    total_M1 = running_MV[:, -1:]
    at_MP = torch.minimum((points_MP * total_M1).long(), total_M1 - 1)
    return torch.searchsorted(running_MV, at_MP, right=True).clamp(max=scores_MV.shape[-1] - 1)  # beyond it where a score is NaN
