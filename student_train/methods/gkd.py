"""Distillation on what the student itself writes (GKD).

Shapes: N scored words of all rows, V words.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, ClassVar

from pydantic import Field

from online.batch import Batch, Features
from online.models import LoadedModel
from online.rollout import Writing, has_prompt
from store.shape import ModelShape
from student_train.methods.base import Kind, Method, Stages, Temperature, Terms
from student_train.methods.divergences import jsd, of_tokens
from student_train.methods.losses import unit_count, word_logits
from student_train.methods.writing import LOGITS, check_writers, only, written
from student_train.schedule import Scheduled, check_range


class GKD(Method):
    """JSD_beta(p || q) of the teacher's and the student's next word, at the words of a response.

    Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist, Bachem, "On-Policy Distillation of Language Models: Learning from Self-Generated
    Mistakes", ICLR 2024, arXiv 2306.13649, algorithm 1. In each step, with probability ``lmbda``, the responses of the rows are
    replaced by what the student, as it is now, writes to their prompts; no gradient goes through the writing. One draw decides for
    the whole step, as in TRL. Divergence: student_train.methods.divergences.jsd; ``beta`` 0 and 1 are KL(p || q) and KL(q || p).

    The paper varies lmbda and beta (on-policy is lmbda 1); the defaults are TRL's. ``temperature`` is that of writing; the divergence is
    at 1 (the paper's T of the teacher is left out, as in TRL). Top-k and top-p are off, as in the paper. The paper averages over the
    words of each response and then over responses; here, as in TRL, over all words of the batch.

    SeqKD (the teacher's responses in place of the data's) is no option: they don't depend on the student, so they are written
    once, as rows, and learned from with lmbda 0, from a store too. lmbda 0 needs no teacher at work; anything else does.

    Rows that are scored as a whole (plain text) have no prompt and stay as they are. Rows that the student wrote teach no
    method without a teacher (``lm_loss``): their words are no truth.

    Term ``words``: sum over scored words.
    """

    paper = "Agarwal et al. 2024, arXiv 2306.13649"
    stages: ClassVar[Stages] = {"pretraining": ("soft",)}
    kinds: ClassVar[frozenset[Kind]] = frozenset({"changes its loss as it goes"})
    accepts = "causal, with the teacher's tokenizer"

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        lmbda: Scheduled = 0.5,
        beta: Annotated[float, Field(ge=0, le=1)] = 0.5,
        temperature: Temperature = 0.9,
        max_new_tokens: Annotated[int, Field(ge=1)] = 128,
    ) -> None:
        check_writers(student, teacher)
        check_range("lmbda", lmbda, least=0, most=1)
        super().__init__({LOGITS}, {LOGITS})
        self.lmbda, self.temperature, self.max_new_tokens = lmbda, temperature, max_new_tokens
        self.divergence = partial(jsd, beta=beta)
        self.shared = min(student.vocab, teacher.vocab)
        self.rewrites = lmbda != 0
        self.teacher: LoadedModel | None = None

    def attach(self, teachers: Mapping[str, LoadedModel]) -> None:
        self.teacher = only(teachers)

    def decided(self) -> Sequence[int]:
        return (int(self._writes()),)

    def rewrite(self, batch: Batch, student: LoadedModel) -> Batch:
        if not self._writes() or not has_prompt(batch).any():
            return batch
        assert self.teacher is not None
        writing = Writing(self.max_new_tokens, self.now(self.temperature), self.shared)
        return written(batch, student, self.teacher, writing, self.moment)

    def counts(self, batch: Batch) -> Terms:
        return {"words": unit_count(batch, "labels")}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        return {"words": of_tokens(self.divergence, word_logits(student, LOGITS, batch), word_logits(teacher, LOGITS, batch)).sum()}

    def _writes(self) -> bool:
        return float(self.moment.draws("gkd", self.moment.step).random()) < self.now(self.lmbda)
