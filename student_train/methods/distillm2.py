"""Given responses drawn nearer and written ones pushed off (DistiLLM-2).

Shapes: B rows, T padded tokens, N scored words of all rows, V words.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from online.batch import Batch, Features
from online.models import LoadedModel
from online.rollout import Writing, has_prompt, side_by_side
from store.shape import ModelShape
from student_train.methods.base import Kind, Method, Stages, Temperature, Terms
from student_train.methods.divergences import forward_kl, mixture, of_tokens, skew_forward
from student_train.methods.losses import word_logits
from student_train.methods.writing import LOGITS, check_writers, only, padding, written
from student_train.schedule import Scheduled, check_range


class DistiLLM2(Method):
    """(2 - beta) KL(p || alpha p + (1 - alpha) q) on given responses, beta KL(q || (1 - alpha) p + alpha q) on written ones.

    Ko, Chen, Kim et al., "DistiLLM-2: A Contrastive Approach Boosts the Distillation of LLMs", ICML 2025, arXiv 2503.07067. Given
    responses should be the teacher's, written beforehand as the rows'; to each prompt of a step the student writes one too, so that a step
    learns from twice as many rows. q in the mixture of the second term carries no gradient, as in the authors' code; the paper raises
    ``beta`` from 1 to 1.5 in the first half (a schedule; their released recipes leave it at 1).

    Ours: the student writes in each step as it is then, where the paper writes once an epoch; alpha is one number for all responses,
    where the paper fits it to each of them between .01 and .1. ``max_new_tokens`` is unverified.

    Rows that are scored as a whole (plain text) have no prompt: they count as given, and nothing is written to them.

    Terms ``given`` and ``written``: sums over the words of either.
    """

    paper = "Ko et al. 2025, arXiv 2503.07067"
    stages: ClassVar[Stages] = {"pretraining": ("soft",)}
    kinds: ClassVar[frozenset[Kind]] = frozenset({"changes its loss as it goes"})
    accepts = "causal, with the teacher's tokenizer"
    rewrites = True

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        beta: Scheduled = 1.0,
        temperature: Temperature = 0.8,
        max_new_tokens: Annotated[int, Field(ge=1)] = 256,
    ) -> None:
        check_writers(student, teacher)
        check_range("beta", beta, least=0, most=2)
        super().__init__({LOGITS}, {LOGITS})
        self.alpha, self.beta, self.temperature, self.max_new_tokens = alpha, beta, temperature, max_new_tokens
        self.shared = min(student.vocab, teacher.vocab)
        self.teacher: LoadedModel | None = None

    def attach(self, teachers: Mapping[str, LoadedModel]) -> None:
        self.teacher = only(teachers)

    def rewrite(self, batch: Batch, student: LoadedModel) -> Batch:
        if not has_prompt(batch).any():
            return batch
        assert self.teacher is not None
        writing = Writing(self.max_new_tokens, self.now(self.temperature), self.shared)
        return side_by_side(batch, written(batch, student, self.teacher, writing, self.moment), padding(self.teacher))

    def counts(self, batch: Batch) -> Terms:
        own_N = _own(batch)
        return {"given": (~own_N).sum().float(), "written": own_N.sum().float()}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        own_N, logits, target = _own(batch), word_logits(student, LOGITS, batch), word_logits(teacher, LOGITS, batch)
        beta, near, off = self.now(self.beta), partial(skew_forward, alpha=self.alpha), partial(_against_itself, alpha=self.alpha)
        return {
            "given": (2 - beta) * of_tokens(near, logits.at(~own_N), target.at(~own_N)).sum(),
            "written": beta * of_tokens(off, logits.at(own_N), target.at(own_N)).sum(),
        }


def _own(batch: Batch) -> Tensor:
    """[N] bool: scored words that the student wrote."""
    own_B = torch.zeros_like(batch.rows, dtype=torch.bool) if batch.written is None else batch.written
    return own_B[:, None].expand_as(batch.mask)[batch.labelled]


def _against_itself(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """[...] KL(q || (1 - alpha) p + alpha q), the mixture without gradient."""
    return forward_kl(log_q, mixture(log_p, log_q.detach(), 1 - alpha))
