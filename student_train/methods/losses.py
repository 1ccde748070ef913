"""Distances and relations that several methods share, as plain functions in float32.

Shapes: B rows, T tokens (queries), S tokens (keys), U units (the valid tokens of a batch, or its rows), W width, H heads.
Padding is taken out before any arithmetic, so that whatever stands there reaches neither a loss nor a gradient.
Masked pairs hold a finite number, never -inf: 0 * -inf is NaN.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from online.batch import Batch, Features, dense, leftmost
from online.masks import pair_mask
from online.words import Words, as_words
from store.features import FeatureKey
from store.shape import ModelShape

MASKED = -1e30
"""Score of a pair or word that is left out: far below any other, and still finite when divided by a temperature."""


def units(value: Tensor, batch: Batch, positions: str) -> Tensor:
    """[U, ...] float32: the valid tokens of a value at ``all`` or ``leftN``, the value itself at other positions."""
    if positions.startswith("left"):
        value = value[leftmost(batch, value.shape[1])]
    return (value[batch.mask] if positions == "all" else value).float()


def vectors(features: Features, key: FeatureKey, batch: Batch) -> Tensor:
    """[U, W] float32 vectors of the feature ``key``; all of its word logits at once."""
    value = features[key]
    return value.logits if isinstance(value, Words) else units(dense(features, key), batch, key.positions)


def word_logits(features: Features, key: FeatureKey, batch: Batch) -> Words:
    """The feature ``key`` of word logits, for ``online.words.each``; they need not exist all at once."""
    value = features[key]
    return value if isinstance(value, Words) else as_words(vectors(features, key, batch))


def of_blocks(student: Features, teacher: Features, site: str, blocks: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's value of ``site`` at all tokens of a pair of blocks."""
    return dense(student, FeatureKey(site, blocks[0])), dense(teacher, FeatureKey(site, blocks[1]))


def zero_padded(value_BTW: Tensor, batch: Batch) -> Tensor:
    """[B, T, W] float32 with zeros on padding, whatever stands there."""
    return value_BTW.float().masked_fill(~batch.mask[..., None], 0)


def unit_count(batch: Batch, positions: str) -> Tensor:
    """0-d float32: how many vectors ``vectors`` finds; known from the masks."""
    if positions == "all":
        return batch.mask.sum().float()
    if positions in ("masked", "labels"):
        return batch.labelled.sum().float()
    if positions.startswith("left"):
        return batch.lengths.clamp(max=int(positions.removeprefix("left"))).sum().float()
    return torch.tensor(float(len(batch.mask)), device=batch.mask.device)


def row_means(value_U: Tensor, batch: Batch) -> Tensor:
    """[B] mean over each row's tokens of a number [U] for each of them."""
    value_BT = value_U.new_zeros(batch.mask.shape)
    value_BT[batch.mask] = value_U
    return value_BT.sum(1) / batch.lengths


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """[...] squared difference, mean over the last axis."""
    return (student - teacher).square().mean(-1)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """[...] 1 - cos of the vectors on the last axis."""
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """[...] T^2 KL(softmax(teacher / T) || softmax(student / T)) over the last axis of logits (Hinton et al. 2015)."""
    log_p, log_q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def soft_ce(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """[...] T^2 times the cross entropy of softmax(student / T) under softmax(teacher / T); ``kl`` plus the teacher's entropy."""
    return -(temperature**2) * ((teacher / temperature).softmax(-1) * (student / temperature).log_softmax(-1)).sum(-1)


def attended(query_BW: Tensor, values_BLW: Tensor) -> Tensor:
    """[B, W] mean of the values of L layers, each weighted by the softmax over layers of its dot product with the query; no parameters."""
    scores_BL = (values_BLW @ query_BW[..., None]).squeeze(-1)
    return (scores_BL.softmax(-1)[..., None] * values_BLW).sum(1)


def group_log_softmax(scores_B: Tensor, groups_B: Tensor) -> Tensor:
    """[B] log-softmax of each score among the rows of its group; the rows of a group stand together."""
    names, group_B = groups_B.unique_consecutive(return_inverse=True)
    top_G = scores_B.new_full((len(names),), MASKED).scatter_reduce(0, group_B, scores_B.detach(), "amax")
    shifted_B = scores_B - top_G[group_B]
    total_G = scores_B.new_zeros(len(names)).index_add(0, group_B, shifted_B.exp())
    return shifted_B - total_G.log()[group_B]


def shared_pairs(batch: Batch, student: ModelShape, teacher: ModelShape, blocks: tuple[int, int]) -> Tensor:
    """[B, 1, T, S] bool: pairs that the student's and the teacher's block of ``blocks`` both see; no padding on either side.

    Where the two models see differently (windows, a causal student of a bidirectional teacher), the relation of the
    teacher is that among the tokens which the student may see too.
    """
    seen = pair_mask(batch, student, max(blocks[0], 1)) & pair_mask(batch, teacher, max(blocks[1], 1))
    return seen & batch.mask[:, None, :, None] & batch.mask[:, None, None, :]


def pair_count(batch: Batch, student: ModelShape, teacher: ModelShape, blocks: list[tuple[int, int]]) -> Tensor:
    """0-d float32 number of shared pairs, mean over the pairs of ``blocks`` (they differ only where windows do)."""
    return torch.stack([shared_pairs(batch, student, teacher, pair).sum() for pair in blocks]).float().mean()


def relation(x_BTW: Tensor, heads: int, batch: Batch) -> Tensor:
    """[B, heads, T, S] scaled dot products X X^T / sqrt(W / heads) of every head of ``x_BTW`` (MiniLM, MiniLMv2)."""
    x_BHTW = zero_padded(x_BTW, batch).unflatten(-1, (heads, -1)).transpose(1, 2)
    return x_BHTW @ x_BHTW.mT / x_BHTW.shape[-1] ** 0.5


def map_kl(student_BHTS: Tensor, teacher_BHTS: Tensor, pairs_B1TS: Tensor) -> Tensor:
    """0-d KL(softmax(teacher) || softmax(student)) of rows of scores over the seen keys: sum over queries, mean over heads.

    A row without pairs (padding) is uniform on both sides and adds exactly 0.
    """
    hidden = ~pairs_B1TS
    return kl(student_BHTS.float().masked_fill(hidden, MASKED), teacher_BHTS.float().masked_fill(hidden, MASKED)).mean(1).sum()


def map_mse(student_BHTS: Tensor, teacher_BHTS: Tensor, pairs_B1TS: Tensor) -> Tensor:
    """0-d squared difference of scores: sum over the seen pairs, mean over heads."""
    return _map_squares(student_BHTS, teacher_BHTS, pairs_B1TS).sum()


def row_map_mse(student_BHTS: Tensor, teacher_BHTS: Tensor, pairs_B1TS: Tensor) -> Tensor:
    """[B] squared difference of scores: mean over each row's seen pairs and over heads."""
    return _map_squares(student_BHTS, teacher_BHTS, pairs_B1TS).sum((1, 2)) / pairs_B1TS.sum((1, 2, 3))


def _map_squares(student_BHTS: Tensor, teacher_BHTS: Tensor, pairs_B1TS: Tensor) -> Tensor:
    """[B, T, S] squared difference, mean over heads; 0 where a pair is not seen."""
    difference_BHTS = student_BHTS.float().masked_fill(~pairs_B1TS, 0) - teacher_BHTS.float().masked_fill(~pairs_B1TS, 0)
    return difference_BHTS.square().mean(1)


def projection(student_width: int, teacher_width: int) -> nn.Module:
    """A learned linear map where the widths differ, else the identity."""
    return nn.Identity() if student_width == teacher_width else nn.Linear(student_width, teacher_width)
