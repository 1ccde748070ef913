"""MGSKD: relations among tokens, among phrases and among whole rows.

Shapes: B rows, R rows of all ranks, T tokens, N points of a row (tokens or phrases), H heads, W width, D width of a head.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from online.batch import Batch, Features, dense
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.gather import gathered, own
from student_train.methods.angles import directions
from student_train.methods.base import LayerMap, Method, Stages, Terms, Weight, check_weights, layer_pairs
from student_train.methods.losses import projection, unit_count, vectors, zero_padded
from student_train.methods.structure import companions, corners, pair_loss, phrase_companions, phrase_means, triple_loss


class MGSKD(Method):
    """Squared differences of scaled dot products and Huber losses of angles, at three granularities, in ``heads`` parts of the width.

    Liu, Tao, Feng, Zhao, "Multi-Granularity Structural Knowledge Distillation for Language Model Compression", ACL 2022. The
    first ``token_layers`` pairs of layers compare tokens with tokens and phrases (mean over their tokens) with phrases, all others
    rows (mean over their tokens) with the rows of the micro-batch, over all ranks:

    - pairs (not of rows): x_i . x_j / sqrt(d);
    - triplets: cos of the angle at i between j and k. Tokens and phrases take i from the ``global_points`` that all points of the
      row attend to most, j and k from the ``local_points`` that i attends to most, by the teacher's softmax of the dot products.

    Phrases are frozen with the rows (``phrases`` in the dump's recipe); ``phrase: 0`` needs none. GLMKD (Tan et al. 2023, arXiv
    2306.06629) draws segments of random lengths anew in each step instead. ``uniform`` and ``last`` begin at the embedding output;
    pairs are taken as they are. W is learned where widths differ, one for all layers, as the authors' code expects states of the
    teacher's width.

    Weights, 20 points and 2 layers are those of the authors' code. ``heads`` by default is the largest number up to its 64 that divides
    the teacher's width. That code skips rows of fewer than three phrases, and takes the mean over all triplets of tokens, where here each
    point has a mean of its own; its triplets of rows include those that repeat a row, whose loss is 0. The paper trains this alone
    on augmented data, starting from a generally distilled TinyBERT, and then the prediction.

    Terms ``token_pair``, ``phrase_pair`` (pairs), ``token_triple``, ``phrase_triple`` (points with two or more others), ``sample`` (rows);
    sums over layers, means over heads.
    """

    paper = "Liu, Tao, Feng, Zhao 2022, ACL"
    stages: ClassVar[Stages] = {"task structural": ("embedding", "hidden"), "task prediction": ("soft",)}
    kinds = frozenset({"reads intermediate features", "has parameters of its own", "compares rows of a batch", "trains in several phases"})
    accepts = "any heads, any width; a projection is learned where widths differ"

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        layers: LayerMap = "uniform",
        token_layers: Annotated[int, Field(ge=0)] = 2,
        heads: Annotated[int, Field(ge=1)] | None = None,
        global_points: Annotated[int, Field(ge=1)] = 20,
        local_points: Annotated[int, Field(ge=2)] = 20,
        token: Weight = 1.0,
        phrase: Weight = 1.0,
        sample: Weight = 4.0,
    ) -> None:
        check_weights("mgskd", token, phrase, sample)
        blocks = layer_pairs(layers, student, teacher, lowest=0)
        if isinstance(layers, str):
            blocks = [(0, 0), *blocks]
        lower, upper = blocks[:token_layers], blocks[token_layers:]
        if (token or phrase) and not lower:
            raise ValueError("token_layers: expected at least 1 for tokens and phrases, or token: 0 and phrase: 0; found 0")
        if sample and not upper:
            raise ValueError(f"token_layers: expected fewer than the {len(blocks)} pairs of layers, or sample: 0; found {token_layers}")
        if heads is None:
            heads = max(number for number in range(1, min(64, teacher.width) + 1) if teacher.width % number == 0)
        if teacher.width % heads:
            raise ValueError(f"heads: expected a number that divides the teacher's width {teacher.width}, found {heads}")
        lower, upper = lower if token or phrase else [], upper if sample else []
        student_keys, teacher_keys = (
            {FeatureKey("hidden", pair[side]) for pair in lower} | {FeatureKey("hidden", pair[side], "mean") for pair in upper}
            for side in (0, 1)
        )
        super().__init__(student_keys, teacher_keys)
        self.lower, self.upper, self.heads, self.most = lower, upper, heads, (global_points, local_points)
        self.sample = sample
        self.weights = {name: weight for name, weight in (("token", token), ("phrase", phrase)) if weight}
        self.reads_phrases = phrase > 0
        self.least_rows = 3 if sample else 1
        self.projection = projection(student.width, teacher.width)

    def counts(self, batch: Batch) -> Terms:
        terms: Terms = {}
        for name in self.weights:
            seen_BNN = _seen(name, batch)
            terms[f"{name}_pair"] = seen_BNN.sum().float()
            terms[f"{name}_triple"] = corners(seen_BNN).sum(1).clamp(max=self.most[0]).sum().float()
        if self.sample:
            terms["sample"] = unit_count(batch, "row")
        return terms

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        terms: Terms = {}
        for name, weight in self.weights.items():
            seen_BNN = _seen(name, batch)
            pairs, triples = [], []
            for s, t in self.lower:
                student_BTW = zero_padded(self.projection(zero_padded(dense(student, FeatureKey("hidden", s)), batch)), batch)
                teacher_BTW = zero_padded(dense(teacher, FeatureKey("hidden", t)), batch)
                student_BHND, teacher_BHND = (
                    self._split(phrase_means(x_BTW, batch) if name == "phrase" else x_BTW) for x_BTW in (student_BTW, teacher_BTW)
                )
                pairs.append(pair_loss(student_BHND, teacher_BHND, seen_BNN))
                triples.append(triple_loss(student_BHND, teacher_BHND, seen_BNN, self.most))
            terms[f"{name}_pair"] = weight * torch.stack(pairs).sum()
            terms[f"{name}_triple"] = weight * torch.stack(triples).sum()
        if self.sample:
            keys = [(FeatureKey("hidden", s, "mean"), FeatureKey("hidden", t, "mean")) for s, t in self.upper]
            losses = [self._rows(self.projection(vectors(student, s, batch)), vectors(teacher, t, batch)) for s, t in keys]
            terms["sample"] = self.sample * torch.stack(losses).sum()
        return terms

    def _split(self, x_BNW: Tensor) -> Tensor:
        """[B, H, N, D] parts of the width."""
        return x_BNW.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _rows(self, student_BW: Tensor, teacher_BW: Tensor) -> Tensor:
        """0-d Huber loss of the angles at the own rows between rows of all ranks: sum over rows, mean over triplets and heads."""
        student_BHRR, teacher_BHRR = (self._angles(x_BW) for x_BW in (student_BW, teacher_BW))
        rows = student_BHRR.shape[-1]
        itself_RR = torch.eye(rows, dtype=torch.bool, device=student_BW.device)
        loss_BRR = F.huber_loss(student_BHRR, teacher_BHRR, reduction="none").mean(1).masked_fill(itself_RR, 0)
        return loss_BRR.sum() / max(1, (rows - 1) * (rows - 2))

    def _angles(self, x_BW: Tensor) -> Tensor:
        """[B, H, R, R] cosines; 0 with the row itself as an end."""
        all_RW = gathered(x_BW, self.training)
        sides_BRW = all_RW[own(x_BW, self.training), None] - all_RW
        sides_BHRD = directions(self._split(sides_BRW))
        return sides_BHRD @ sides_BHRD.mT


def _seen(name: str, batch: Batch) -> Tensor:
    return phrase_companions(batch) if name == "phrase" else companions(batch)
