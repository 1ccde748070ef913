"""FSP: how features flow from one block to a later one.

Shapes: B rows, T and S tokens, W and V width.
"""

from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from online.batch import Batch, Features, dense
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods.base import LayerMap, Method, Stages, Terms, block_keys, layer_pairs
from student_train.methods.losses import pair_count, projection, shared_pairs, unit_count, zero_padded


class FSP(Method):
    """sum over flows of the mean of (G_s - G_t)^2, G the Gram matrix of the hidden states of two blocks.

    Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning",
    CVPR 2017, equations 1 and 2: G[i, j] = sum_t X_1[t, i] X_2[t, j] / n over the n tokens of a row, where the paper has the
    points of an image. A flow goes from each entry of ``layers`` to the next; ``uniform`` and ``last`` begin at the embedding
    output. ``[[2, 4], [2, 4]]`` is the Gram matrix of one block. The paper sums the squares of G, here the mean is over its W^2
    numbers, as in TextBrewer (Yang et al. 2020, arXiv 2002.12620), where the loss is called ``fsp`` or ``gram``.

    ``over: width`` is TextBrewer's ``nst`` or ``mmd``: G[t, s] = sum_i X_1[t, i] X_2[s, i] / W over width, one number for each pair
    of tokens that both models' later blocks let see each other. It needs no equal widths and no W; ``over: tokens`` learns
    one linear map for all layers where widths differ. The paper trains in two stages: this alone, then the task.

    Term ``flow``: sum over flows; over rows, mean over W^2 (``over: tokens``), or over pairs of tokens (``over: width``).
    """

    paper = "Yim, Joo, Bae, Kim 2017, CVPR"
    stages: ClassVar[Stages] = {"intermediate": ("hidden",), "task": ("hard",)}
    kinds = frozenset({"reads intermediate features", "has parameters of its own", "trains in several phases"})
    accepts = "any heads, any width; a projection is learned where widths differ, with over: width none"

    def __init__(
        self, student: ModelShape, teacher: ModelShape, *, layers: LayerMap = "uniform", over: Literal["tokens", "width"] = "tokens"
    ) -> None:
        blocks = layer_pairs(layers, student, teacher, lowest=0)
        if isinstance(layers, str):
            blocks = [(0, 0), *blocks]
        if len(blocks) < 2:
            raise ValueError("layers: a flow goes from one entry to the next: expected two or more, found one")
        super().__init__(*block_keys(["hidden"], blocks))
        self.flows, self.over, self.student, self.teacher = list(pairwise(blocks)), over, student, teacher
        self.projection = projection(student.width, teacher.width) if over == "tokens" else nn.Identity()

    def counts(self, batch: Batch) -> Terms:
        if self.over == "width":
            return {"flow": pair_count(batch, self.student, self.teacher, [later for _, later in self.flows])}
        return {"flow": unit_count(batch, "row")}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        losses = []
        for (from_s, from_t), (to_s, to_t) in self.flows:
            student_B, teacher_B = (
                self._gram(self._states(features, first, batch, project), self._states(features, second, batch, project), batch)
                for features, first, second, project in ((student, from_s, to_s, self.projection), (teacher, from_t, to_t, nn.Identity()))
            )
            squares_B = (student_B - teacher_B).square()
            if self.over == "width":
                seen_BTS = shared_pairs(batch, self.student, self.teacher, (to_s, to_t)).squeeze(1)
                losses.append(squares_B.masked_fill(~seen_BTS, 0).sum())
            else:
                losses.append(squares_B.mean((1, 2)).sum())
        return {"flow": torch.stack(losses).sum()}

    def _states(self, features: Features, block: int, batch: Batch, project: nn.Module) -> Tensor:
        """[B, T, W] hidden states of ``block``; zero on padding."""
        states_BTW = zero_padded(dense(features, FeatureKey("hidden", block)), batch)
        return zero_padded(project(states_BTW), batch)

    def _gram(self, first_BTW: Tensor, second_BTW: Tensor, batch: Batch) -> Tensor:
        """[B, W, V], or [B, T, S] with ``over: width``."""
        if self.over == "width":
            return first_BTW @ second_BTW.mT / first_BTW.shape[-1]
        return first_BTW.mT @ second_BTW / batch.lengths[:, None, None]
