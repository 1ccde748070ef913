"""Distances and angles among points, for losses on how vectors lie to each other.

Shapes: N points, W width; leading dimensions are free. Nothing here is ever NaN, neither value nor gradient: the direction
from a point to another one in the same place is zero, and so is the cosine of an angle with such a side.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def distances(x_NW: Tensor) -> Tensor:
    """[..., N, N] Euclidean distances; the slope between points in one place is 0."""
    found: Tensor = _Distances.apply(x_NW)
    return found


def angle_cosines(one: Tensor, other: Tensor, across: Tensor) -> Tensor:
    """[...] cosine of the angle between two sides of a triangle, from their lengths and that of the side across (law of cosines)."""
    product = 2 * one * other
    flat = product == 0
    return ((one.square() + other.square() - across.square()) / product.masked_fill(flat, 1)).masked_fill(flat, 0)


def directions(difference_W: Tensor) -> Tensor:
    """[..., W] vectors of length one."""
    squared = difference_W.square().sum(-1, keepdim=True)
    nowhere = squared == 0
    return (difference_W * squared.masked_fill(nowhere, 1).rsqrt()).masked_fill(nowhere, 0)


class _Distances(torch.autograd.Function):
    """torch.cdist, whose own backward pass takes N^2 W numbers on a GPU; this one is a matrix product."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_NW: Tensor) -> Tensor:
        found_NN: Tensor = torch.cdist(x_NW, x_NW, compute_mode="donot_use_mm_for_euclid_dist")
        ctx.save_for_backward(x_NW, found_NN)
        return found_NN

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_NN: Tensor) -> Tensor:
        x_NW, found_NN = ctx.saved_tensors  # type: ignore[attr-defined]
        nowhere_NN = found_NN == 0
        pull_NN = (grad_NN / found_NN.masked_fill(nowhere_NN, 1)).masked_fill(nowhere_NN, 0)
        pull_NN = pull_NN + pull_NN.mT
        x_NW = x_NW - x_NW[..., :1, :]  # moves no distance, and keeps what all points share out of the sums
        slope_NW: Tensor = pull_NN.sum(-1, keepdim=True) * x_NW - pull_NN @ x_NW
        return slope_NW
