"""MobileBERT's progressive knowledge transfer: one block after the other learns the feature map and the attention of its teacher.

Shapes: U tokens, W width, H heads, T tokens (queries), S tokens (keys).
"""

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from online.batch import Batch, Features
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods.base import (
    LayerMap,
    Method,
    Stages,
    Terms,
    Weight,
    block_keys,
    check_equal,
    check_site,
    check_weights,
    layer_pairs,
)
from student_train.methods.losses import map_kl, mse, of_blocks, shared_pairs, unit_count, vectors

Share = Annotated[float, Field(ge=0, le=1)]


class MobileBERT(Method):
    """100 MSE(LN(H_s), LN(H_t)) + 5000 (mu_s - mu_t)^2 + 5 |var_s - var_t| + KL(A_t || A_s) of one pair of blocks at a time.

    Sun, Yu, Song, Liu, Yang, Zhou, "MobileBERT: a Compact Task-Agnostic BERT for Resource-Limited Devices", ACL 2020, arXiv 2004.02984,
    progressive knowledge transfer, with the weights of the authors' code. The phase has as many equal slices as there are pairs, in the
    order of the student's blocks; in each only its pair is compared: feature maps H (LN is layer norm without weights; mean mu and
    variance var over the width, of each token) and attention A. The features of all blocks are read in every step. The paper's equations
    are a plain MSE of feature maps and KL of attention: ``normalise: false`` with ``hidden: 1, mean: 0, variance: 0``.

    Learning rates are part of the method. The blocks of the slice train at ``rate`` times the phase's learning rate, those below them at
    ``earlier`` of that, all else (embeddings, head, blocks above) not at all: neither weight decay nor the optimiser's moments touch
    it. Within each slice a curve begins anew, the lower one of share / ``rise`` and ``fall`` + (1 - ``fall``) sqrt(1 - share), share being
    what is over of the slice. Take a constant learning rate for the phase (theirs: LAMB, 1.5e-3, 10,000 steps a block, batches of 2,048,
    dropout off in the student).

    The authors' code takes mu_t and var_t over the stack of all of the teacher's layers, so that every block is drawn to the statistics of
    all; here they are those of its own. It also lets padding count, divides by the number of blocks (``weight: 0.0417`` for 24), takes
    cross entropy for KL (the same gradient), and forgets the moments at the start of a slice. GLMKD slows earlier blocks by
    weighting their loss, which leaves the gradients of the others at full size.

    Terms ``hidden`` (tokens, mean over width), ``mean``, ``variance`` (tokens) and ``attention`` (query tokens, mean over heads).
    """

    paper = "Sun, Yu, Song, Liu, Yang, Zhou 2020, arXiv 2004.02984"
    stages: ClassVar[Stages] = {"transfer": ("hidden", "attention"), "pretraining": ("soft", "hard")}
    kinds = frozenset(
        {"reads intermediate features", "reads other features as it goes", "changes its loss as it goes", "trains in several phases"}
    )
    accepts = "as many attention heads, equal widths"

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        layers: LayerMap = "uniform",
        hidden: Weight = 100.0,
        mean: Weight = 5000.0,
        variance: Weight = 5.0,
        attention: Weight = 1.0,
        normalise: bool = True,
        rate: Annotated[float, Field(gt=0)] = 3.0,
        earlier: Share = 0.1,
        rise: Share = 0.1,
        fall: Share = 0.9,
    ) -> None:
        check_weights("mobilebert", hidden, mean, variance, attention)
        blocks = sorted(layer_pairs(layers, student, teacher))
        if len({s for s, _ in blocks}) < len(blocks):
            raise ValueError(f"layers: expected each student block once, since each has its own slice of the phase, found {blocks}")
        compares = bool(hidden or mean or variance)
        if compares:
            check_equal("widths", student.width, teacher.width, "its teacher is made as wide as the student between blocks (IB-BERT)")
        if attention:
            check_site("attention_scores", student, teacher)
            check_equal("numbers of attention heads", student.heads, teacher.heads, "attention: 0 leaves this term out")
        sites = [site for site, wanted in (("hidden", compares), ("attention_scores", attention)) if wanted]
        super().__init__(*block_keys(sites, blocks))
        self.blocks, self.student, self.teacher, self.normalise = blocks, student, teacher, normalise
        self.weights = {"hidden": hidden, "mean": mean, "variance": variance}
        self.attention, self.rate, self.earlier, self.rise, self.fall = attention, rate, earlier, rise, fall

    def counts(self, batch: Batch) -> Terms:
        tokens = unit_count(batch, "all")
        return {term: tokens for term, weight in {**self.weights, "attention": self.attention}.items() if weight}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        pair, terms = self.blocks[self._slice()[0]], {}
        if any(self.weights.values()):
            s, t = (FeatureKey("hidden", block) for block in pair)
            gaps = self._gaps(vectors(student, s, batch), vectors(teacher, t, batch))
            terms = {term: weight * gaps[term].sum() for term, weight in self.weights.items() if weight}
        if self.attention:
            scores = of_blocks(student, teacher, "attention_scores", pair)
            terms["attention"] = self.attention * map_kl(*scores, shared_pairs(batch, self.student, self.teacher, pair))
        return terms

    def gates(self) -> Mapping[int, float]:
        number, over, length = self._slice()
        curve, share = 1.0, over / length
        if length > 1:
            curve = min(self.fall + (1 - self.fall) * math.sqrt(1 - share), share / self.rise if self.rise else 1.0)
        below, active = self.blocks[number - 1][0] if number else 0, self.blocks[number][0]
        factors = {block: self.earlier if block <= below else float(block <= active) for block in range(1, self.student.layers + 1)}
        return {0: 0.0, **{block: self.rate * curve * factor for block, factor in factors.items()}}

    def _slice(self) -> tuple[int, int, int]:
        """Number of the pair that is compared in this step, from 0; steps of its slice that are over, and all of them."""
        step, steps, slices = self.moment.step, self.moment.steps, len(self.blocks)
        number = min(step * slices // steps, slices - 1)
        first, end = (-(-steps * edge // slices) for edge in (number, number + 1))
        return number, step - first, end - first

    def _gaps(self, student_UW: Tensor, teacher_UW: Tensor) -> dict[str, Tensor]:
        """Term -> [U] of each token."""
        both = (student_UW, teacher_UW)
        mine_UW, theirs_UW = (F.layer_norm(x, x.shape[-1:], eps=1e-12) for x in both) if self.normalise else both
        (mean_U, true_mean_U), (variance_U, true_variance_U) = ([x.mean(-1) for x in both], [x.var(-1, correction=0) for x in both])
        return {
            "hidden": mse(mine_UW, theirs_UW),
            "mean": (mean_U - true_mean_U).square(),
            "variance": (variance_U - true_variance_U).abs(),
        }
