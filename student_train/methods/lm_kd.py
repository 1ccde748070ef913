"""Knowledge distillation from word predictions, dense or from the K likeliest words.

Shapes: U tokens, V words, K kept words.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from online.batch import Batch, Features, TopK
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods.base import Method, Stages, Temperature, Terms, check_equal, check_site
from student_train.methods.losses import MASKED, kl, unit_count, units, vectors


class LMKD(Method):
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)) over words, at all, the labelled or (the same for MLM) the masked tokens.

    Hinton et al. 2015, arXiv 1503.02531, for every token; add ``lm_loss`` for the hard term.

    ``top`` unset reads dense word logits, which a store derives from ``head_input``. ``top: K`` reads the teacher's K
    likeliest words with the mass of all others:

    - ``tail: ghost``: all other words are one ghost word on both sides, sum_K p log(p / q) + p_tail log(p_tail / q_tail).
      Head and tail mass are exact, the shape of the tail is free; a lower bound of the dense KL. At T = 1 only: the
      teacher's tail mass at another temperature does not follow from what is kept, so it is refused.
    - ``tail: none``: KL between the two distributions given that the word is one of the K; exact at every T, because
      softmax(log p / T) over kept words needs no others. The student's mass outside the K is not held back.

    Term ``words``: sum over tokens.
    """

    paper = "Hinton, Vinyals, Dean 2015, arXiv 1503.02531"
    stages: ClassVar[Stages] = {"pretraining": ("soft",)}
    accepts = "any with the teacher's language-model head and vocabulary"

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        positions: Literal["all", "labels", "masked"] = "labels",
        temperature: Temperature = 1.0,
        top: Annotated[int, Field(ge=1)] | None = None,
        tail: Literal["ghost", "none"] = "ghost",
    ) -> None:
        check_site("lm_logits", student, teacher)
        check_equal("heads", student.head, teacher.head)
        check_equal("vocabularies", student.vocab, teacher.vocab)
        if top is not None and top > teacher.vocab:
            raise ValueError(f"top: the vocabulary has {teacher.vocab} words, found {top}")
        if top is None and tail != "ghost":
            raise ValueError("tail: says what becomes of words outside the top K; set top, or leave tail out")
        if top is not None and tail == "ghost" and temperature != 1:
            raise ValueError(
                f"temperature: the mass of the tail is known at temperature 1 only, found {temperature}; "
                "set tail: none (kept words alone), or leave top out (dense logits)"
            )
        student_key = FeatureKey("lm_logits", positions=positions)
        teacher_key = FeatureKey("lm_logits", positions=positions, form="" if top is None else f"top{top}")
        super().__init__({student_key}, {teacher_key})
        self.student_key, self.teacher_key = student_key, teacher_key
        self.positions, self.temperature, self.tail = positions, temperature, tail

    def counts(self, batch: Batch) -> Terms:
        return {"words": unit_count(batch, self.positions)}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        logits_UV, target = vectors(student, self.student_key, batch), teacher[self.teacher_key]
        if not isinstance(target, TopK):
            return {"words": kl(logits_UV, vectors(teacher, self.teacher_key, batch), self.now(self.temperature)).sum()}
        ids_UK = target.ids[batch.mask] if self.positions == "all" else target.ids
        log_p_UK, log_tail_U = (units(value, batch, self.positions) for value in (target.log_probs, target.log_tail))
        if self.tail == "none" or ids_UK.shape[-1] == logits_UV.shape[-1]:  # a ghost of no words has no probability to compare
            return {"words": kl(logits_UV.gather(-1, ids_UK), log_p_UK, self.now(self.temperature)).sum()}
        log_p_UK1 = torch.cat([log_p_UK, log_tail_U[:, None]], -1)
        return {"words": (log_p_UK1.exp() * (log_p_UK1 - head_and_tail(logits_UV, ids_UK))).sum()}


def head_and_tail(logits_UV: Tensor, ids_UK: Tensor) -> Tensor:
    """[U, K + 1] log-probabilities of the words ``ids_UK`` and, last, of all others together."""
    log_sum_U1 = logits_UV.logsumexp(-1, keepdim=True)
    # Summing the other words, instead of log(1 - sum of the K), keeps a small tail and its gradient exact.
    rest_U1 = logits_UV.scatter(-1, ids_UK, MASKED).logsumexp(-1, keepdim=True)
    return torch.cat([logits_UV.gather(-1, ids_UK), rest_U1], -1) - log_sum_U1
