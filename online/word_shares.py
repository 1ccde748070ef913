"""Word logits made small where each rank has those of its own words: by candidates, maxima and sums, without the logits of others.

A rank finds its own likeliest words and the mass of the others; what travels is K numbers and ids a token, not V. Ids and logits are
those of one rank that has all; sums of masses are taken in another order, which moves logarithms by a few of float32's last bits.

Source: Shoeybi et al. 2019, Megatron-LM, section 3 (cross entropy over a vocabulary in parts).

Shapes: M tokens, V words, v words of this rank, R ranks, K kept words, n chosen words, B bands.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from online.bands import codes, in_bands
from online.batch import IGNORED, Selected, TopBanded, TopK
from online.vocabulary import by_logit, likeliest, nucleus, with_tail
from online.words import Share
from store.features import FeatureKey
from store.forms import WordForm, word_form


def combines(key: FeatureKey) -> bool:
    """Whether what ``key`` keeps of word logits follows from ranks' own parts. Draws take the running sum over all words: they do not."""
    form = word_form(key.form)
    return form is None or not form.draws


def in_form_of_shares(form: WordForm, share: Share, logits_Mv: Tensor) -> TopK | TopBanded:
    """What ``form`` keeps of the logits of all words, of which this rank has ``logits_Mv``; the same on all ranks.

    Raises:
        ValueError: the vocabulary has fewer words than are kept.
    """
    form.check(share.vocab)
    top_MK, ids_MK = _likeliest_of_all(share, logits_Mv, form.top)
    others_Mv = _without(share, logits_Mv, ids_MK)
    found = with_tail(top_MK, ids_MK, _total(share, others_Mv.logsumexp(-1, keepdim=True))[:, 0])
    if not form.bands:
        return nucleus(found, form)
    log_sum_exp_M1 = top_MK[:, :1] - found.log_probs[:, :1]
    bands_MB = _total(share, in_bands(others_Mv, form.bands, share.vocab, share.first))
    return TopBanded(ids_MK, found.log_probs, codes(bands_MB - log_sum_exp_M1))


def select_of_shares(share: Share, logits_Mv: Tensor, ids: Sequence[int], labels_M: Tensor) -> Selected:
    """As online.vocabulary.select says, of the logits of all words, of which this rank has ``logits_Mv``."""
    chosen_n = torch.tensor(ids, dtype=torch.int64, device=logits_Mv.device)
    wanted_Mn = torch.cat([chosen_n.expand(len(labels_M), -1), labels_M.clamp(min=0)[:, None]], -1)
    here_Mn = F.pad(logits_Mv, (0, 1), value=-torch.inf).gather(-1, _columns(share, wanted_Mn, logits_Mv.shape[-1]))
    chosen_Mn, true_M1 = share.gathered(here_Mn).amax(0).split([len(ids), 1], -1)
    log_sum_exp_M = _total(share, logits_Mv.logsumexp(-1, keepdim=True))[:, 0]
    return Selected(chosen_n, chosen_Mn, true_M1[:, 0].masked_fill(labels_M == IGNORED, torch.nan), log_sum_exp_M)


def _likeliest_of_all(share: Share, logits_Mv: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` highest logits and their words, [M, K] each, equal ones by rising id: they are among the ``k`` highest of each rank."""
    own = logits_Mv.shape[-1]
    top_MK, ids_MK = likeliest(F.pad(logits_Mv, (0, 1), value=-torch.inf), min(k, own + 1))  # no word, for ranks that have none
    ids_MK = (ids_MK + share.first).masked_fill(ids_MK == own, share.vocab)
    lacking = (0, k - ids_MK.shape[-1])
    found_RMK = share.gathered(F.pad(top_MK, lacking, value=-torch.inf))
    ids_RMK = share.gathered(F.pad(ids_MK, lacking, value=share.vocab))  # places without a word come behind all words
    top_MN, ids_MN = (found.transpose(0, 1).flatten(1) for found in (found_RMK, ids_RMK))
    top_MN, ids_MN = by_logit(top_MN, ids_MN)
    return top_MN[:, :k], ids_MN[:, :k]


def _without(share: Share, logits_Mv: Tensor, ids_MK: Tensor) -> Tensor:
    """[M, v + 1] this rank's logits, those of the words ``ids_MK`` minus infinity, and minus infinity behind them."""
    places_MK = _columns(share, ids_MK, logits_Mv.shape[-1])
    return F.pad(logits_Mv, (0, 1), value=-torch.inf).scatter(-1, places_MK, -torch.inf)


def _columns(share: Share, ids: Tensor, own: int) -> Tensor:
    """Where words stand among the ``own`` of this rank; behind them those that others have."""
    places = ids - share.first
    return places.masked_fill((places < 0) | (places >= own), own)


def _total(share: Share, part_Mn: Tensor) -> Tensor:
    """[M, n] the log-sum-exp of all ranks' parts."""
    return share.gathered(part_Mn).logsumexp(0)
