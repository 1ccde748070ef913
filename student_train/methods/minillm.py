"""Reverse Kullback-Leibler divergence of whole responses, by policy gradient (MiniLLM).

Shapes: B rows, T padded tokens, N scored words of all rows, V words.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from online.batch import Batch, Features
from online.models import LoadedModel
from online.rollout import Writing, has_prompt
from online.tensor_parallel import Split
from store.shape import ModelShape
from student_train.methods.base import Kind, Method, Stages, Terms
from student_train.methods.divergences import mixture, of_tokens, reverse_kl
from student_train.methods.losses import vectors
from student_train.methods.writing import LOGITS, check_writers, only, written


class MiniLLM(Method):
    """KL(q || p) of the student's and the teacher's distributions over whole responses, by its gradient on sampled ones.

    Gu, Dong, Wei, Huang, "MiniLLM: Knowledge Distillation of Large Language Models", ICLR 2024, arXiv 2306.08543, section 2.2. Responses y
    are drawn word by word from ``mix`` p + (1 - ``mix``) q (teacher-mixed sampling), at temperature 1. With r_t = log p(y_t) / q(y_t) given
    what stands in front of it and w_t = q(y_t) / (mix p(y_t) + (1 - mix) q(y_t)), the paper's weight of a word in place of the
    exact product over all words before it, the loss is the sum over the words of a response of

    - ``single``: w_t KL(q_t || p_t), exact over the vocabulary (single-step decomposition; w_t carries no gradient);
    - ``long``: -min(w_t R, clip(w_t, 1 - ``clip``, 1 + ``clip``) R), R the sum of r over the *later* words of the response, without
      gradient; with ``length_norm`` their mean, so that long responses are not preferred or shunned. The last word has R = 0.

    Without ``length_norm``, ``clip`` and ``mix`` its gradient is, in expectation, that of KL(q || p) itself.

    Simplified: each response is learned from once, in the step that it is written in (one PPO epoch; the authors' code takes 4), so the
    student that wrote is the one that learns and no old probabilities are kept; both factors of w_t are those of the training pass,
    which differ from those at writing by the student's dropout alone. The authors' code also scales rewards by 1/2, clips them, whitens R
    over the batch, counts r_t itself into R and leaves w_t out of the exact term: none of that is in the paper's equations, nor
    here. Terms are means over words, as in that code.

    The paper adds a language-model loss on plain text: give the phase a second store of rows that are scored as a whole, and ``lm_loss``.
    Rows without a prompt are not rewritten, and not counted here. Start from a student that is fine-tuned on the task.

    Terms ``single`` and ``long``: sums over words of responses.
    """

    paper = "Gu, Dong, Wei, Huang 2024, arXiv 2306.08543"
    stages: ClassVar[Stages] = {"pretraining": ("soft",)}
    kinds: ClassVar[frozenset[Kind]] = frozenset({"changes its loss as it goes"})
    accepts = "causal, with the teacher's tokenizer"
    rewrites = True

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        mix: Annotated[float, Field(ge=0, lt=1)] = 0.2,
        clip: Annotated[float, Field(gt=0, lt=1)] | None = 0.2,
        length_norm: bool = True,
        max_new_tokens: Annotated[int, Field(ge=1)] = 256,
    ) -> None:
        check_writers(student, teacher)
        super().__init__({LOGITS}, {LOGITS})
        self.mix, self.clip, self.length_norm, self.max_new_tokens = mix, clip, length_norm, max_new_tokens
        self.shared = min(student.vocab, teacher.vocab)
        self.teacher: LoadedModel | None = None

    def attach(self, teachers: Mapping[str, LoadedModel]) -> None:
        self.teacher = only(teachers)
        if self.mix and isinstance(self.teacher.weights, Split):
            raise ValueError(
                "minillm: a teacher split by tensor parallelism cannot write along; expected sharding zero3, fsdp or none, or mix: 0"
            )

    def rewrite(self, batch: Batch, student: LoadedModel) -> Batch:
        if not has_prompt(batch).any():
            return batch
        assert self.teacher is not None
        writing = Writing(self.max_new_tokens, words=self.shared, mixed=self.mix, other=self.teacher)
        return written(batch, student, self.teacher, writing, self.moment)

    def counts(self, batch: Batch) -> Terms:
        words = (batch.labelled & has_prompt(batch)[:, None]).sum().float()
        return {"single": words, "long": words}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        logits_NV, target_NV = (vectors(side, LOGITS, batch)[:, : self.shared] for side in (student, teacher))
        counted_N = has_prompt(batch)[:, None].expand_as(batch.mask)[batch.labelled].float()
        if not counted_N.any():
            return dict.fromkeys(("single", "long"), logits_NV[:0].sum())  # nothing, still differentiable
        log_q_N, log_p_N = (word_log_probs(logits, batch) for logits in (logits_NV, target_NV))
        reward_N = (log_p_N - log_q_N).detach()
        later_N = later(reward_N, batch, self.length_norm)
        weight_N = (log_q_N - mixture(log_p_N, log_q_N.detach(), self.mix)).exp()
        gain_N = weight_N * later_N
        if self.clip is not None:
            gain_N = torch.minimum(gain_N, weight_N.clamp(1 - self.clip, 1 + self.clip) * later_N)
        exact_N = weight_N.detach() * of_tokens(reverse_kl, logits_NV, target_NV)
        return {"single": (exact_N * counted_N).sum(), "long": -(gain_N * counted_N).sum()}


def word_log_probs(logits_NV: Tensor, batch: Batch) -> Tensor:
    """[N] log-probability of each scored word."""
    if batch.token_labels is None:
        return logits_NV.sum(-1)  # N = 0
    words_N1 = batch.token_labels[batch.labelled][:, None]
    return (logits_NV.gather(-1, words_N1) - logits_NV.logsumexp(-1, keepdim=True)).squeeze(-1)


def later(reward_N: Tensor, batch: Batch, mean: bool) -> Tensor:
    """[N] the sum, or the mean, of the rewards of a row's later words; 0 for its last one."""
    reward_BT = reward_N.new_zeros(batch.mask.shape)
    reward_BT[batch.labelled] = reward_N
    after_BT = reward_BT.flip(1).cumsum(1).flip(1) - reward_BT
    left_BT = batch.labelled.flip(1).cumsum(1).flip(1) - batch.labelled.long()
    total_BT = after_BT / left_BT.clamp(min=1) if mean else after_BT
    return total_BT.masked_fill(left_BT == 0, 0)[batch.labelled]
