"""What the student is unsure of decides who teaches it, on which rows, and what.

Shapes: B rows, T tokens, U decisions (rows, labelled tokens or groups of choices), R those of all ranks, K chosen ones of R, C classes or
choices, N teachers.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from online.batch import Batch, Features
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.gather import gathered, own
from student_train.methods.base import (
    LayerMap,
    Method,
    Stages,
    TeacherShapes,
    Temperature,
    Terms,
    Weight,
    check_equal,
    check_weights,
    layer_pairs,
)
from student_train.methods.decisions import check_decides, decisions, score_losses, shared_task
from student_train.methods.losses import MASKED, kl, mse, vectors
from student_train.methods.task_loss import answer_count, label_count, label_loss


class Uncertainty(Method):
    """CE(y, z_s) + KD, where KD follows the student's uncertainty u = H(softmax(z_s)) / log C, without gradient.

    Li, Lin, Ren, Li, Zhou, Sun, "Dynamic Knowledge Distillation for Pre-trained Language Models", EMNLP 2021, arXiv 2109.11295,
    and the authors' code. Teachers stand from small to large. KD of a row from one teacher is the squared difference of logits (mean over
    classes), or T^2 KL with ``distance: kl``. Three things can be dynamic, each by itself or together:

    - *Teachers.* ``hard``: of the rows in descending order of u, the first N-th learns from the smallest teacher, the next from the next;
      each teacher's mean counts fully, as in the authors' code (GLMD's authors: 1 / N^2 of that). ``soft``: all from all, teacher i = 0 ..
      N - 1 with weight 2 / N (u + (1 - 2 u) i / (N - 1)), for two teachers u and 1 - u, of u's mean over the batch; ``soft_rows``: of
      each row's own u. For more than two the weights are GLMD's, here with sum 1.
    - *Rows.* Only the share ``fraction`` of a batch that is most uncertain (rounded, at least one row) learns from teachers; by the
      ``entropy``, the ``margin`` between the two likeliest classes, or the ``confidence`` in the likeliest. All learn from labels.
      Teachers are shared out among the rows that are left.
    - *Objective.* ``hidden`` > 0 adds the squared difference of unit hidden states at each token of the mapped blocks, sum over blocks,
      mean over tokens and width, with weight u, and gives the logits 1 - u. The authors also compare the embedding output ([0, 0]).

    A batch is the rows of one micro-batch on all ranks, so accumulation makes batches smaller. Differences to the authors' code: u
    has no gradient in soft weights, padding counts nowhere. The temperature is that of their code.

    Terms ``soft`` and ``hidden`` (rows; choices: groups; token classification: tokens): the mean over the chosen ones stands for all rows,
    so that counts are known beforehand; ``hard`` (those with a label).
    """

    paper = "Li et al. 2021, EMNLP, arXiv 2109.11295"
    stages: ClassVar[Stages] = {"task": ("hidden", "soft", "hard")}
    kinds = frozenset({"compares rows of a batch", "learns from several teachers", "changes its loss as it goes"})
    accepts = "classes or choices; hidden: classes, equal widths"
    several = True
    least_rows = 2

    def __init__(
        self,
        student: ModelShape,
        teachers: TeacherShapes,
        *,
        adoption: Literal["hard", "soft", "soft_rows"] = "hard",
        fraction: Annotated[float, Field(gt=0, le=1)] = 1.0,
        by: Literal["entropy", "margin", "confidence"] = "entropy",
        distance: Literal["mse", "kl"] = "mse",
        temperature: Temperature = 5.0,
        layers: LayerMap = "uniform",
        soft: Weight = 1.0,
        hidden: Weight = 0.0,
        hard: Weight = 1.0,
    ) -> None:
        check_weights("uncertainty", soft, hidden)
        check_decides(student, "dgkd, which compares scores too")
        key = shared_task(student, teachers)
        if hidden and student.head != "classification":
            raise ValueError(f"hidden goes with rows of classes, a head of classification; found {student.head}; hidden: 0 leaves it out")
        pairs = {name: layer_pairs(layers, student, teacher, lowest=0) for name, teacher in teachers.items()} if hidden else {}
        for name in pairs:
            check_equal(f"widths (teacher {name})", student.width, teachers[name].width, "hidden: 0 leaves hidden states out")
        blocks = {FeatureKey("hidden", t).of(name) for name, own_pairs in pairs.items() for _, t in own_pairs}
        logits = {key.of(name) for name in teachers} if soft else set()
        own_blocks = {FeatureKey("hidden", s) for own_pairs in pairs.values() for s, _ in own_pairs}
        super().__init__({key} | own_blocks, blocks | logits, reads_labels=hard > 0)
        self.key, self.shape, self.teachers, self.pairs = key, student, tuple(teachers), pairs
        self.adoption, self.fraction, self.by, self.distance, self.temperature = adoption, fraction, by, distance, temperature
        self.soft, self.hidden, self.hard = soft, hidden, hard

    def counts(self, batch: Batch) -> Terms:
        answers = answer_count(batch, self.shape)
        terms = ({"soft": answers} if self.soft else {}) | ({"hidden": answers} if self.hidden else {})
        return terms | ({"hard": label_count(batch, self.shape)} if self.hard else {})

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        logits, terms = vectors(student, self.key, batch), {}
        student_UC = decisions(logits, batch, self.shape)
        doubt_U, shares_UN = self._shares(student_UC.detach())
        if self.soft:
            share_UN = shares_UN * (1 - doubt_U)[:, None] if self.hidden else shares_UN
            losses = [
                self._distance(student_UC, decisions(vectors(teacher, self.key.of(name), batch), batch, self.shape))
                for name in self.teachers
            ]
            terms["soft"] = self.soft * (share_UN * torch.stack(losses, 1)).sum()
        if self.hidden:
            losses = [self._apart(student, teacher, batch, name) for name in self.teachers]
            terms["hidden"] = self.hidden * (shares_UN * doubt_U[:, None] * torch.stack(losses, 1)).sum()
        if self.hard:
            terms["hard"] = self.hard * label_loss(logits, batch, self.shape)
        return terms

    def _shares(self, student_UC: Tensor) -> tuple[Tensor, Tensor]:
        """[U] uncertainty, and [U, N] how much each decision learns from each teacher; 0 where it was not chosen."""
        p_UC, real_UC = student_UC.softmax(-1), student_UC > MASKED
        doubt_U = -(p_UC * student_UC.log_softmax(-1)).sum(-1) / real_UC.sum(-1).clamp(min=2).log()
        doubt_R, mine = gathered(doubt_U, self.training), own(doubt_U, self.training)
        unsure_R = doubt_R if self.by == "entropy" else gathered(self._unsure(p_UC), self.training)
        teachers, chosen = len(self.teachers), max(1, round(self.fraction * len(unsure_R)))
        chosen_R = _ranks(unsure_R) < chosen
        if self.adoption == "hard":
            rank_R = _ranks(doubt_R.masked_fill(~chosen_R, -torch.inf))  # from 0 on among the chosen
            teacher_R = (((rank_R + 1) * teachers - 1) // chosen).clamp(max=teachers - 1)
            shares_RN = F.one_hot(teacher_R, teachers) * chosen_R[:, None]
            return doubt_U, (shares_RN * len(doubt_R) / shares_RN.sum(0).clamp(min=1))[mine]
        u_R = doubt_R if self.adoption == "soft_rows" else doubt_R.mean().expand_as(doubt_R)
        size_N = torch.linspace(0, 1, teachers, device=u_R.device) if teachers > 1 else torch.full((1,), 0.5, device=u_R.device)
        shares_RN = 2 / teachers * (u_R[:, None] + (1 - 2 * u_R[:, None]) * size_N)
        return doubt_U, (shares_RN * chosen_R[:, None] * len(doubt_R) / chosen)[mine]

    def _unsure(self, p_UC: Tensor) -> Tensor:
        """[U] how little a decision is sure, by its margin or confidence."""
        top_U2 = p_UC.topk(min(2, p_UC.shape[-1]), -1).values
        return -(top_U2[:, 0] - (top_U2[:, 1:].sum(-1) if self.by == "margin" else 0))

    def _distance(self, student_UC: Tensor, teacher_UC: Tensor) -> Tensor:
        if self.distance == "mse":
            return score_losses(student_UC, teacher_UC)
        return kl(student_UC, teacher_UC, self.now(self.temperature))

    def _apart(self, student: Features, teacher: Features, batch: Batch, name: str) -> Tensor:
        """[B] squared difference of unit hidden states: sum over blocks, mean over a row's tokens and over width."""
        row_T, total_B = batch.mask.nonzero()[:, 0], torch.zeros(len(batch.mask), device=batch.mask.device)
        for s, t in self.pairs[name]:
            both = vectors(student, FeatureKey("hidden", s), batch), vectors(teacher, FeatureKey("hidden", t).of(name), batch)
            total_B = total_B.index_add(0, row_T, mse(*(F.normalize(x, dim=-1) for x in both)))
        return total_B / batch.lengths


def _ranks(x_R: Tensor) -> Tensor:
    """[R] int64 place of each in descending order; equal ones in their order."""
    return x_R.argsort(descending=True, stable=True).argsort()
