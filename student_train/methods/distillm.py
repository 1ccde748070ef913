"""Skewed divergences on a mixture of given, freshly written and kept responses (DistiLLM).

Shapes: B rows, T padded tokens, N scored words of all rows, V words, C kept responses, L their tokens with the prompt.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from online.batch import Batch, Features, bucket, dense
from online.models import LoadedModel
from online.rollout import Writing, answered, has_prompt, prompt_lengths
from store.shape import ModelShape
from student_train.gather import gathered, summed
from student_train.methods.base import Kind, Method, Stages, Temperature, Terms
from student_train.methods.divergences import of_tokens, skew_forward, skew_reverse
from student_train.methods.losses import unit_count, word_logits
from student_train.methods.minillm import word_log_probs
from student_train.methods.writing import LOGITS, check_writers, only, padding, written
from student_train.schedule import Scheduled, check_range
from student_train.step import Step, run

RISE, TOLERANCE = 0.1, 0.1
"""How much the share of written responses grows at a time, and what the validation loss must have risen by."""


class DistiLLM(Method):
    """KL(q || (1 - alpha) p + alpha q) or KL(p || alpha p + (1 - alpha) q) of teacher p and student q, at the words of a response.

    Ko, Kim, Chen, Yun, "DistiLLM: Towards Streamlined Distillation for Large Language Models", ICML 2024, arXiv 2402.03898; what the
    paper leaves open follows its code. ``skew`` reverse is SRKL, forward SKL.

    Adaptive off-policy responses: a number r in [0, 1) is drawn for each step, and with the share phi of written responses

    - r < phi (1 - t / T), T the steps of the phase, or r < phi while fewer than ``capacity`` responses are kept: the student writes
      responses to the step's prompts, learns from them, and they are kept, the oldest making room;
    - otherwise r < phi: each row is replaced by a kept response with its prompt, drawn at random;
    - otherwise the rows stay as they are.

    phi is ``share``, a number or a schedule, or, where that is unset, the paper's: it starts at 0 and grows by .1 whenever the validation
    loss is .1 or more above that of the look before. The loss is the student's cross entropy on the phase's ``meta`` rows, a batch of
    which is read in each step (in eval mode): its mean since the last look, ``every`` steps before (an epoch by default). The authors'
    code measures all held-out rows at once, and compares with the loss at which phi last grew. What is kept lies in the checkpoint.

    Rows that are scored as a whole (plain text) have no prompt and stay as they are; add ``lm_loss`` and a second store of them for the
    paper's pretraining loss. ``longest``: a response that is longer with its prompt is not kept. One draw of a kept response for each row
    and step, with replacement; the authors' code draws without.

    Term ``words``: sum over scored words.
    """

    paper = "Ko, Kim, Chen, Yun 2024, arXiv 2402.03898"
    stages: ClassVar[Stages] = {"pretraining": ("soft",)}
    kinds: ClassVar[frozenset[Kind]] = frozenset({"changes its loss as it goes"})
    accepts = "causal, with the teacher's tokenizer"
    watches = True
    kept_ids: Tensor
    kept_prompts: Tensor
    kept_lengths: Tensor
    kept: Tensor
    phi: Tensor
    before: Tensor
    judged: Tensor

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        skew: Literal["reverse", "forward"] = "reverse",
        alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        share: Scheduled | None = None,
        every: Annotated[int, Field(ge=1)] | None = None,
        capacity: Annotated[int, Field(ge=1)] = 1000,
        longest: Annotated[int, Field(ge=2)] = 512,
        temperature: Temperature = 1.0,
        max_new_tokens: Annotated[int, Field(ge=1)] = 256,
    ) -> None:
        check_writers(student, teacher)
        if share is not None:
            check_range("share", share, least=0, most=1)
            if every is not None:
                raise ValueError("every: says how often the validation loss moves the share; leave it out, or share")
        super().__init__({LOGITS}, {LOGITS})
        self.divergence = partial(skew_reverse if skew == "reverse" else skew_forward, alpha=alpha)
        self.share, self.every, self.temperature, self.max_new_tokens = share, every, temperature, max_new_tokens
        self.shared = min(student.vocab, teacher.vocab)
        self.reads_meta, self.rewrites = share is None, share != 0
        self.teacher: LoadedModel | None = None
        self.register_buffer("kept_ids", torch.zeros(capacity, longest, dtype=torch.int32))
        self.register_buffer("kept_prompts", torch.zeros(capacity, dtype=torch.int32))
        self.register_buffer("kept_lengths", torch.zeros(capacity, dtype=torch.int32))
        self.register_buffer("kept", torch.zeros((), dtype=torch.int64))  # responses ever kept; the newest is at (kept - 1) % capacity
        self.register_buffer("phi", torch.zeros((), dtype=torch.float64))
        self.register_buffer("before", torch.full((), math.inf, dtype=torch.float64))  # validation loss at the last look
        self.register_buffer("judged", torch.zeros(2, dtype=torch.float64))  # sum and number of words since then, on this rank

    def attach(self, teachers: Mapping[str, LoadedModel]) -> None:
        self.teacher = only(teachers)

    def decided(self) -> Sequence[int]:
        return ("given", "written", "kept").index(self._responses()), int(self.kept)

    def rewrite(self, batch: Batch, student: LoadedModel) -> Batch:
        responses = self._responses()
        if responses == "given" or not has_prompt(batch).any():
            return batch
        assert self.teacher is not None
        if responses == "kept":
            return self._replayed(batch, padding(self.teacher))
        fresh = written(batch, student, self.teacher, Writing(self.max_new_tokens, self.now(self.temperature), self.shared), self.moment)
        self._keep(fresh)
        return fresh

    def prepare(self, step: Step) -> None:
        if not self.reads_meta or step.meta is None:
            return
        model, batch = step.student.model, step.meta[0]
        training = model.training
        model.eval()
        with torch.no_grad():
            log_q_N = word_log_probs(dense(run(step.student, batch, [LOGITS]), LOGITS), batch)
        model.train(training)
        self.judged += torch.stack([-log_q_N.double().sum(), batch.labelled.sum().double()])

    def learned(self, means: Mapping[str, float]) -> None:
        every = self.every or max(1, int(self.moment.epoch_steps))
        if not self.reads_meta or (self.moment.step + 1) % every:
            return
        total, words = summed(self.judged, True).tolist()
        if not words:
            return
        loss = total / words
        if loss >= float(self.before) + TOLERANCE:
            self.phi.add_(RISE).clamp_(max=1.0)
        self.before.fill_(loss)
        self.judged.zero_()

    def counts(self, batch: Batch) -> Terms:
        return {"words": unit_count(batch, "labels")}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        return {"words": of_tokens(self.divergence, word_logits(student, LOGITS, batch), word_logits(teacher, LOGITS, batch)).sum()}

    def _responses(self) -> Literal["given", "written", "kept"]:
        """Whose responses this step learns from."""
        share = float(self.phi) if self.share is None else self.now(self.share)
        drawn = float(self.moment.draws("distillm", self.moment.step).random())
        if drawn >= share:
            return "given"
        filling = int(self.kept) < len(self.kept_ids)
        return "written" if filling or drawn < share * (1 - self.moment.share) else "kept"

    def _keep(self, fresh: Batch) -> None:
        """Remember the responses of all ranks, in the order of their rows."""
        capacity, longest = self.kept_ids.shape
        tokens = min(longest, fresh.input_ids.shape[1])
        ids_BL = fresh.input_ids.new_zeros(len(fresh.rows), longest)
        ids_BL[:, :tokens] = fresh.input_ids[:, :tokens]
        columns = torch.stack([fresh.rows, prompt_lengths(fresh), fresh.lengths], 1)
        found = gathered(torch.cat([columns, ids_BL], 1), True)
        found = found[found[:, 2] <= longest]
        found = found[found[:, 0].argsort(stable=True)][-capacity:]
        place = (self.kept + torch.arange(len(found), device=found.device)) % capacity
        self.kept_prompts[place], self.kept_lengths[place] = found[:, 1].int(), found[:, 2].int()
        self.kept_ids[place] = found[:, 3:].int()
        self.kept += len(found)

    def _replayed(self, batch: Batch, pad: int) -> Batch:
        """``batch`` with kept prompts and responses in its rows."""
        most = min(int(self.kept), len(self.kept_ids))
        drawn = [self.moment.draws(f"kept response for row {row}", self.moment.step).integers(most) for row in batch.rows.tolist()]
        place = torch.tensor(drawn, device=self.kept_ids.device)
        lengths_B = self.kept_lengths[place].long()
        padded = bucket(int(lengths_B.max()))
        ids_BT = self.kept_ids.new_zeros(len(place), padded, dtype=torch.int64)
        tokens = min(padded, self.kept_ids.shape[1])
        ids_BT[:, :tokens] = self.kept_ids[place, :tokens].long()
        return answered(batch, ids_BT, self.kept_prompts[place].long(), lengths_B, pad)
