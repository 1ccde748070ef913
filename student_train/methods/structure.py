"""The structure of the points of a row, tokens or phrases: dot products of pairs, and angles at the points that matter most.

Shapes: B rows, T tokens, P phrases, N points, H heads, D width of a head, V points that angles are taken at, K points around each.
``seen_BNN`` says which points of a row are compared, each with itself too.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from online.batch import Batch
from student_train.methods.angles import directions
from student_train.methods.losses import MASKED


def companions(batch: Batch) -> Tensor:
    """[B, T, T] bool: pairs of tokens of one row, or of one document of a packed row; no padding."""
    return _alike(batch.mask, batch.documents)


def phrase_companions(batch: Batch) -> Tensor:
    """[B, P, P] bool: the same for phrases, in their order."""
    of_BPT = _tokens_of_phrases(batch)
    documents_BP = None if batch.documents is None else (of_BPT * batch.documents[:, None]).amax(-1)
    return _alike(of_BPT.any(-1), documents_BP)


def phrase_means(x_BTW: Tensor, batch: Batch) -> Tensor:
    """[B, P, W] mean of each phrase's tokens; 0 where a row has no such phrase."""
    of_BPT = _tokens_of_phrases(batch).float()
    return of_BPT @ x_BTW / of_BPT.sum(-1, keepdim=True).clamp(min=1)


def corners(seen_BNN: Tensor) -> Tensor:
    """[B, N] bool: points with two or more others, which angles can be taken at."""
    return seen_BNN.sum(-1) > 2


def pair_loss(student_BHND: Tensor, teacher_BHND: Tensor, seen_BNN: Tensor) -> Tensor:
    """0-d squared difference of scaled dot products: sum over pairs, mean over heads."""
    difference_BHNN = _products(student_BHND) - _products(teacher_BHND)
    return difference_BHNN.masked_fill(~seen_BNN[:, None], 0).square().mean(1).sum()


def triple_loss(student_BHND: Tensor, teacher_BHND: Tensor, seen_BNN: Tensor, most: tuple[int, int]) -> Tensor:
    """0-d Huber loss of cos of the angle at a point between two others, both chosen by the teacher.

    Sum over up to ``most[0]`` points of each row, mean over the ordered pairs of up to ``most[1]`` others around each, mean over heads.
    """
    points = seen_BNN.shape[1]
    weight_BNN = _products(teacher_BHND).masked_fill(~seen_BNN[:, None], MASKED).softmax(-1).sum(1).masked_fill(~seen_BNN, 0)
    other_BNN = seen_BNN & ~torch.eye(points, dtype=torch.bool, device=seen_BNN.device)
    at_BV = weight_BNN.sum(1).masked_fill(~corners(seen_BNN), -1).topk(min(most[0], points)).indices
    rows_BVN = at_BV[..., None].expand(-1, -1, points)
    around_BVK = weight_BNN.masked_fill(~other_BNN, -1).gather(1, rows_BVN).topk(min(most[1], points)).indices
    real_BVK = other_BNN.gather(1, rows_BVN).gather(2, around_BVK) & corners(seen_BNN).gather(1, at_BV)[..., None]
    real_BVKK = real_BVK[..., :, None] & real_BVK[..., None, :] & ~torch.eye(around_BVK.shape[2], dtype=torch.bool, device=at_BV.device)
    student_BHVKK, teacher_BHVKK = (_angles(x_BHND, at_BV, around_BVK) for x_BHND in (student_BHND, teacher_BHND))
    loss_BVKK = F.huber_loss(student_BHVKK, teacher_BHVKK, reduction="none").mean(1).masked_fill(~real_BVKK, 0)
    return (loss_BVKK.sum((2, 3)) / real_BVKK.sum((2, 3)).clamp(min=1)).sum()


def _products(x_BHND: Tensor) -> Tensor:
    return x_BHND @ x_BHND.mT / x_BHND.shape[-1] ** 0.5


def _angles(x_BHND: Tensor, at_BV: Tensor, around_BVK: Tensor) -> Tensor:
    """[B, H, V, K, K] cosines of the angles at the points ``at_BV`` between those around them."""
    _, heads, _, width = x_BHND.shape
    at_BHVD = x_BHND.gather(2, at_BV[:, None, :, None].expand(-1, heads, -1, width))
    around_BHVKD = x_BHND.gather(2, around_BVK.flatten(1)[:, None, :, None].expand(-1, heads, -1, width)).unflatten(2, around_BVK.shape[1:])
    sides_BHVKD = directions(at_BHVD[:, :, :, None] - around_BHVKD)
    return sides_BHVKD @ sides_BHVKD.mT


def _alike(real_BN: Tensor, documents_BN: Tensor | None) -> Tensor:
    pairs_BNN = real_BN[:, :, None] & real_BN[:, None, :]
    return pairs_BNN if documents_BN is None else pairs_BNN & (documents_BN[:, :, None] == documents_BN[:, None, :])


def _tokens_of_phrases(batch: Batch) -> Tensor:
    """[B, P, T] bool: which tokens a phrase has.

    Raises:
        ValueError: the rows have no phrases.
    """
    if batch.phrases is None:
        raise ValueError(
            "expected rows with phrases, found rows without: build them with rows.phrases in the dump's recipe, or set phrase: 0"
        )
    most = max(1, int(batch.phrases.max()))
    return batch.phrases[:, None, :] == torch.arange(1, most + 1, device=batch.phrases.device)[:, None]
