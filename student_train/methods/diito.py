"""DIITO: the student is to answer like its teacher also after both have taken hidden states of another text.

Shapes: B rows, T padded tokens, U tokens that are not padding, V words, W width.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from online.batch import Batch, Features, dense
from online.interchange import counterfactual, written
from store.features import FeatureKey
from store.intervention import Intervention
from store.shape import ModelShape
from student_train.methods.base import (
    Method,
    Stages,
    TeacherShapes,
    Temperature,
    Terms,
    Weight,
    check_block,
    check_equal,
    check_site,
    check_vocabularies,
)
from student_train.methods.divergences import word_kl
from student_train.methods.lm_loss import word_loss
from student_train.methods.losses import cosine, unit_count, vectors, word_logits
from student_train.step import Step

LOGITS, LABELS, FINAL = FeatureKey("lm_logits"), FeatureKey("lm_logits", positions="labels"), FeatureKey("final")

Alignment = Literal["full", "middle", "late"] | list[tuple[int, int | list[int]]]
"""Which blocks are exchanged: pairs of a student block and the teacher block, or blocks, that go with it, of which each pair of rows draws
one; or a rule for them."""


class DIITO(Method):
    """a_ce T^2 KL(z_t || z_s) + a_mlm CE(y, z_s) + a_cos (1 - cos(h_s, h_t)), and the same of counterfactuals without labels.

    Wu, Geiger, Rozner, Kreiss, Lu, Icard, Potts, Goodman, "Causal Distillation for Language Models", NAACL 2022, arXiv 2112.02505,
    section 3; numbers of its code. Rows stand in pairs (``rows.interchange``): in the counterfactual pass each row, the base, has hidden
    states of the other, the source, at the places that the rows' plan names, in the teacher and in the student. The student's source states
    are those of its ordinary pass over the same batch, with gradient. KL and cosine are of softmax(z / T) and the last hidden states, and
    over all tokens but padding; z_s and z_t of the counterfactual terms are those of the counterfactual pass. The teacher answers twice,
    as ``factual`` and, with the intervention that ``layers`` comes to, as ``counterfactual``.

    ``layers``, for n_s and n_t blocks: ``full`` takes student block s and all teacher blocks from (s - 1) n_t / n_s + 1 to s n_t / n_s for
    each s (the reference has one or all of them: unverified); ``middle`` takes n_s / 2 and n_t / 2; ``late`` n_s / 2 and n_s / 2 + 1 with
    the teacher blocks n_t - n_s above them (for 12 and 6 as published; for others ours). Or pairs [s, t] and [s, [t, u]].

    The authors' code reads a source state from the input of a block and writes it over the block's output, one block too far; here both
    are the output. It draws one alternative for a step, here a pair of rows does, since the plan is frozen with them. ``crossway``: each
    row is a base, so that an epoch has as many bases as it has rows, as published, where bases and sources are drawn apart; ``false``:
    only the first of a pair. GLMKD (Tan et al. 2023) writes what enters attention and leaves the residual as it is: a weaker intervention.

    Terms ``ce``, ``cos`` (tokens), ``mlm`` (labelled tokens), ``causal_ce``, ``causal_cos`` (tokens of bases).
    """

    paper = "Wu et al. 2022, NAACL, arXiv 2112.02505"
    stages: ClassVar[Stages] = {"pretraining": ("hidden", "soft", "hard")}
    kinds = frozenset({"reads intermediate features", "changes what the student computes", "learns from several teachers"})
    accepts = "the teacher's language-model head and vocabulary, for the cosine its width; at most as many blocks"
    several = True

    def __init__(
        self,
        student: ModelShape,
        teachers: TeacherShapes,
        *,
        layers: Alignment = "full",
        temperature: Temperature = 2.0,
        alpha_ce: Weight = 0.25,
        alpha_mlm: Weight = 0.25,
        alpha_cos: Weight = 0.25,
        alpha_causal_ce: Weight = 0.25,
        alpha_causal_cos: Weight = 0.0,
        crossway: bool = True,
        factual: str = "factual",
        counterfactual: str = "counterfactual",
    ) -> None:
        for name in (factual, counterfactual):
            if name not in teachers:
                raise ValueError(f"expected teachers {factual} and {counterfactual}, found {', '.join(teachers)}")
        teacher = teachers[factual]
        if teachers[counterfactual] != teacher:
            raise ValueError(f"expected one teacher that answers with and without an intervention; {counterfactual} has another shape")
        if not (alpha_causal_ce or alpha_causal_cos):
            raise ValueError("alpha_causal_ce and alpha_causal_cos are 0, and without them nothing is exchanged; distilbert has the rest")
        if alpha_ce or alpha_mlm or alpha_causal_ce:
            check_site("lm_logits", student, teacher)
            check_equal("heads", student.head, teacher.head)
            check_vocabularies(student, teacher)
        if alpha_cos or alpha_causal_cos:
            hint = "the cosine has no projection; alpha_cos: 0 and alpha_causal_cos: 0 leave it out"
            check_equal("widths", student.width, teacher.width, hint)
        pairs = aligned(layers, student, teacher)
        before = {key for key, weight in ((LOGITS, alpha_ce), (LABELS, alpha_mlm), (FINAL, alpha_cos)) if weight}
        after = {key for key, weight in ((LOGITS, alpha_causal_ce), (FINAL, alpha_causal_cos)) if weight}
        blocks = [[s] for s, _ in pairs]
        super().__init__(
            {*before, *written(blocks)},
            {*(key.of(factual) for key in before - {LABELS}), *(key.of(counterfactual) for key in after)},
        )
        self.interventions = {counterfactual: Intervention(layers=tuple(tuple(t) for _, t in pairs))}
        self.blocks, self.after, self.temperature, self.crossway = blocks, after, temperature, crossway
        self.factual, self.counterfactual = factual, counterfactual
        self.ce, self.mlm, self.cos, self.causal_ce, self.causal_cos = alpha_ce, alpha_mlm, alpha_cos, alpha_causal_ce, alpha_causal_cos
        self._autocast: torch.dtype | None = None

    def prepare(self, step: Step) -> None:
        """Note how the student runs, for the pass that ``forward`` makes: losses themselves are without autocast."""
        device = step.batch.mask.device.type
        self._autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def counts(self, batch: Batch) -> Terms:
        every, bases = unit_count(batch, "all"), self._bases(batch).sum().float()
        counted = {"ce": every, "mlm": unit_count(batch, "labels"), "cos": every, "causal_ce": bases, "causal_cos": bases}
        return {term: count for term, count in counted.items() if self._weights()[term]}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        temperature, terms = self.now(self.temperature), {}
        known = {key.of(""): value for key, value in teacher.items() if key.pass_name == self.factual}
        if self.ce:
            terms["ce"] = self.ce * word_kl(word_logits(student, LOGITS, batch), word_logits(known, LOGITS, batch), temperature).sum()
        if self.mlm:
            terms["mlm"] = self.mlm * word_loss(word_logits(student, LABELS, batch), batch)
        if self.cos:
            terms["cos"] = self.cos * cosine(vectors(student, FINAL, batch), vectors(known, FINAL, batch)).sum()
        after, bases_BT = self._after(student, batch), self._bases(batch)
        other = {key.of(""): value for key, value in teacher.items() if key.pass_name == self.counterfactual}
        if self.causal_ce:
            mine, theirs = (word_logits(side, LOGITS, batch).at(bases_BT[batch.mask]) for side in (after, other))
            terms["causal_ce"] = self.causal_ce * word_kl(mine, theirs, temperature).sum()
        if self.causal_cos:
            own_UW, other_UW = (dense(side, FINAL)[bases_BT].float() for side in (after, other))
            terms["causal_cos"] = self.causal_cos * cosine(own_UW, other_UW).sum()
        return terms

    def _after(self, student: Features, batch: Batch) -> Features:
        """What the student answers once its rows have taken each other's hidden states."""
        assert self.running_student is not None
        dtype = self._autocast if self.training else None
        with torch.autocast(batch.mask.device.type, dtype, enabled=dtype is not None):
            return counterfactual(self.running_student, batch, self.after, self.blocks, student)

    def _bases(self, batch: Batch) -> Tensor:
        """[B, T] bool: the tokens of rows that are bases."""
        first = torch.arange(len(batch.mask), device=batch.mask.device) % 2 == 0
        return batch.mask if self.crossway else batch.mask & first[:, None]

    def _weights(self) -> Mapping[str, float]:
        return {"ce": self.ce, "mlm": self.mlm, "cos": self.cos, "causal_ce": self.causal_ce, "causal_cos": self.causal_cos}


def aligned(layers: Alignment, student: ModelShape, teacher: ModelShape) -> list[tuple[int, list[int]]]:
    """Student block and teacher blocks of each alternative.

    Raises:
        ValueError: blocks that a model lacks, none at all, or a rule for fewer blocks than the models have.
    """
    s, t = student.layers, teacher.layers
    if isinstance(layers, str) and s > t:
        raise ValueError(f"layers: {layers} is for students of at most the teacher's {t} blocks, found {s}; give pairs")
    if layers == "full":
        pairs = [(block, list(range((block - 1) * t // s + 1, block * t // s + 1))) for block in range(1, s + 1)]
    elif layers == "middle":
        pairs = [(max(1, s // 2), [max(1, t // 2)])]
    elif layers == "late":
        first = max(1, s // 2)
        pairs = [(block, [block + t - s]) for block in range(first, min(first + 1, s) + 1)]
    else:
        pairs = [(block, [of] if isinstance(of, int) else of) for block, of in layers]
    if not pairs or not all(blocks for _, blocks in pairs):
        raise ValueError("layers: expected at least one pair [student block, teacher block], found none")
    for block, blocks in pairs:
        check_block("layers", "student", block, student)
        for one in blocks:
            check_block("layers", "teacher", one, teacher)
    return pairs
