"""Stacked internal distillation: attention and [CLS] of the lowest block first, of one block more at a time, then the soft labels.

Shapes: B rows, H heads, T tokens (queries), S tokens (keys).
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from online.batch import Batch, Features
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods.base import (
    LayerMap,
    Method,
    Stages,
    Temperature,
    Terms,
    Weight,
    check_equal,
    check_site,
    check_weights,
    layer_pairs,
    row_token,
)
from student_train.methods.kd import soft_loss
from student_train.methods.losses import cosine, map_kl, of_blocks, shared_pairs, unit_count, vectors
from student_train.methods.task_loss import answer_count, task_key


class SID(Method):
    """sum_{l <= j} [KL(A_t || A_s) + 1 - cos(h_t, h_s)] of the first j pairs of blocks, j = 1, 2, ..., then the soft labels alone.

    Aguilar, Ling, Zhang, Yao, Fan, Guo, "Knowledge Distillation from Internal Representations", AAAI 2020, arXiv 1910.03723,
    stacked internal distillation (by their table experiment 3.4, unverified): A are attention probabilities, h states of [CLS] (of the last
    token in causal students). Pairs are taken in the order of the student's blocks and stay in the sum once they are in. The next one comes
    in when the cosine loss of those that are in, summed over them, falls below ``threshold``, or when their time is over, whichever is
    first: ``limit`` epochs with as many pairs, or without ``limit`` equal slices of the phase, the last one for the soft labels
    (GLMKD's rule; the paper limits epochs, its numbers are unverified). After the last pair the student learns from the logits alone, as
    with ``kd`` and ``alpha: 1``, until the phase ends. The paper also tries labels at all times: that is ``task_loss`` beside it.

    The loss that is held against the threshold is the mean over an optimiser step and all ranks, so all ranks move on together; which
    step that was is in the checkpoint. GLMKD decides in every micro-batch, forgets it at a checkpoint, and lets padding
    attend. Its threshold is 0, which no loss falls below; here None says so.

    Terms ``attention`` (query tokens; sum over blocks, mean over heads) and ``cosine`` (rows; sum over blocks), later ``soft`` (as in
    ``kd``).
    """

    paper = "Aguilar, Ling, Zhang, Yao, Fan, Guo 2020, arXiv 1910.03723"
    stages: ClassVar[Stages] = {"internal": ("attention", "hidden"), "prediction": ("soft",)}
    kinds = frozenset({"reads intermediate features", "reads other features as it goes", "changes its loss as it goes"})
    accepts = "as many attention heads, equal widths, the teacher's task head"
    watches = True

    inside: Tensor
    """0-d int64: how many pairs are in the sum, at least; one more than there are when the soft labels have their turn."""
    since: Tensor
    """0-d int64: steps that were taken before the last of them came in."""

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        layers: LayerMap = "uniform",
        attention: Weight = 1.0,
        cosine: Weight = 1.0,
        threshold: Annotated[float, Field(gt=0)] | None = None,
        limit: Annotated[float, Field(gt=0)] | None = None,
        temperature: Temperature = 1.0,
    ) -> None:
        check_weights("sid", attention, cosine)
        blocks = sorted(layer_pairs(layers, student, teacher))
        if attention:
            check_site("attention_scores", student, teacher)
            check_equal("numbers of attention heads", student.heads, teacher.heads, "attention: 0 leaves this term out")
        if cosine:
            check_equal("widths", student.width, teacher.width, "cosine: 0 leaves this term out")
        elif threshold is not None:
            raise ValueError("threshold is one of the cosine loss, which cosine: 0 leaves out")
        logits, token = task_key(student), row_token(student)
        check_equal("heads", student.head, teacher.head)
        check_equal("numbers of labels", student.labels, teacher.labels)
        sites = [(site, at) for site, at, weight in (("attention_scores", "all", attention), ("hidden", token, cosine)) if weight]
        super().__init__(
            {FeatureKey(site, s, at) for site, at in sites for s, _ in blocks} | {logits},
            {FeatureKey(site, t, at) for site, at in sites for _, t in blocks} | {logits},
        )
        self.blocks, self.student, self.teacher, self.token, self.logits = blocks, student, teacher, token, logits
        self.attention, self.cosine, self.threshold, self.limit, self.temperature = attention, cosine, threshold, limit, temperature
        self.register_buffer("inside", torch.tensor(1))
        self.register_buffer("since", torch.tensor(0))

    def counts(self, batch: Batch) -> Terms:
        if self._level() > len(self.blocks):
            return {"soft": answer_count(batch, self.student)}
        terms = {"attention": unit_count(batch, "all")} if self.attention else {}
        return terms | ({"cosine": unit_count(batch, "row")} if self.cosine else {})

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        level = self._level()
        if level > len(self.blocks):
            mine, theirs = vectors(student, self.logits, batch), vectors(teacher, self.logits, batch)
            return {"soft": soft_loss(mine, theirs, batch, self.student, self.now(self.temperature))}
        terms, blocks = {}, self.blocks[:level]
        if self.attention:
            losses = [
                map_kl(*of_blocks(student, teacher, "attention_scores", pair), shared_pairs(batch, self.student, self.teacher, pair))
                for pair in blocks
            ]
            terms["attention"] = self.attention * torch.stack(losses).sum()
        if self.cosine:
            losses = [self._apart(student, teacher, batch, pair) for pair in blocks]
            terms["cosine"] = self.cosine * torch.stack(losses).sum()
        return terms

    def learned(self, means: Mapping[str, float]) -> None:
        level, steps = self._level(), self.moment.step + 1
        matched = self.threshold is not None and means.get("cosine", torch.inf) < self.threshold * self.cosine
        over = self.limit is not None and steps - int(self.since) >= self.limit * self.moment.epoch_steps
        if level <= len(self.blocks) and (matched or over):
            self.inside.fill_(level + 1)
            self.since.fill_(steps)

    def _level(self) -> int:
        """How many pairs are in the sum in this step."""
        slices = len(self.blocks) + 1
        timely = 1 if self.limit is not None else self.moment.step * slices // self.moment.steps + 1
        return min(slices, max(timely, int(self.inside)))

    def _apart(self, student: Features, teacher: Features, batch: Batch, blocks: tuple[int, int]) -> Tensor:
        mine, theirs = (FeatureKey("hidden", block, self.token) for block in blocks)
        return cosine(vectors(student, mine, batch), vectors(teacher, theirs, batch)).sum()
