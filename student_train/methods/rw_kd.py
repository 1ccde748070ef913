"""RW-KD: how much a row's label and its teacher count follows from what they do to held-out rows.

Shapes: U decisions (rows, labelled tokens or groups of choices), K losses of a micro-batch (first those from labels, then those from the
teacher), P all trained weights of the student.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from online.batch import Batch, Features
from store.shape import ModelShape
from student_train.gather import summed
from student_train.methods.base import Method, Stages, Temperature, Terms, Weight, check_equal, check_weights
from student_train.methods.decisions import hard_losses, soft_losses
from student_train.methods.losses import vectors
from student_train.methods.task_loss import answer_count, label_count, label_loss, task_key
from student_train.step import Step


class RWKD(Method):
    """sum_i [v_i CE(y_i, z_i) + w_i T^2 KL(softmax(z_t / T) || softmax(z_s / T))_i], v and w learned anew for each micro-batch.

    Lu, Ghaddar, Rashid, Rezagholizadeh, Ghodsi, Langlais, "RW-KD: Sample-wise Loss Terms Re-Weighting for Knowledge Distillation",
    Findings of EMNLP 2021: "a meta-learner, simultaneously trained with the student, adaptively re-weights the two losses for each
    sample". How its meta-learner is built and trained is unverified. Here there is none: a weight is what one virtual step of gradient
    descent would gain, as in Ren, Zeng, Yang, Urtasun, "Learning to Reweight Examples for Robust Deep Learning", ICML 2018, arXiv
    1803.09050, equations 5 to 9. With L the mean label loss of rows of the phase's ``meta`` data,

        g_k = -dL(theta - e sum_k u_k grad l_k(theta)) / du_k at u = 0, for e = 1: <grad l_k, grad L>
        weight_k = max(0, g_k) / sum_j max(0, g_j) * number of losses

    over all K losses of the micro-batch and all ranks, those from labels and those from the teacher together: their mean is 1, so that
    either kind may win, and e drops out. A micro-batch in which no loss helps gives 0, as there. The gradients are exact: those of the
    K losses are linear in u, so a second backward pass finds their products with grad L (attention runs without fused kernels, which have
    none).

    Each step takes two more passes of the student, with dropout of their own, and three backward passes. While the student is measured
    all weights are 1. Term ``hard`` (labelled rows, groups or tokens) and ``soft`` (all of them), each loss times ``hard`` or ``soft``.
    """

    paper = "Lu, Ghaddar, Rashid, Rezagholizadeh, Ghodsi, Langlais 2021, Findings of EMNLP"
    stages: ClassVar[Stages] = {"task": ("soft", "hard")}
    kinds = frozenset({"changes its loss as it goes", "compares rows of a batch"})
    accepts = "any with the teacher's task head; held-out rows with labels (meta)"
    reads_meta = True
    takes_gradients = True

    def __init__(
        self, student: ModelShape, teacher: ModelShape, *, temperature: Temperature = 1.0, hard: Weight = 1.0, soft: Weight = 1.0
    ) -> None:
        check_weights("rw_kd", hard, soft)
        key = task_key(student)
        check_equal("heads", student.head, teacher.head)
        check_equal("numbers of labels", student.labels, teacher.labels)
        super().__init__({key}, {key} if soft else (), reads_labels=hard > 0)
        self.key, self.shape, self.temperature, self.hard, self.soft = key, student, temperature, hard, soft
        self.weight_K: Tensor | None = None
        """Of the losses of the micro-batch that is being trained on."""

    def counts(self, batch: Batch) -> Terms:
        terms = {"hard": label_count(batch, self.shape)} if self.hard else {}
        return terms | ({"soft": answer_count(batch, self.shape)} if self.soft else {})

    def prepare(self, step: Step) -> None:
        assert step.meta is not None
        with sdpa_kernel(SDPBackend.MATH):  # in the backward passes too, which may compute activations again
            held_out, student = (step.run(batch, self.student_keys) for batch in (step.meta[0], step.batch))
            with torch.autocast(step.batch.mask.device.type, enabled=False):
                label = label_loss(vectors(held_out, self.key, step.meta[0]), step.meta[0], self.shape)
                losses = self._losses(student, step.teacher, step.batch)
                weights = [weight for weight in step.student.model.parameters() if weight.requires_grad]
                gain_K = self._gains(label, torch.cat(list(losses.values())), weights)
        helpful_K, number = gain_K.clamp(min=0), torch.stack(list(self.counts(step.batch).values())).sum()
        total, number = summed(torch.stack([helpful_K.sum(), number]), self.training)
        self.weight_K = helpful_K * (number / total) if total > 0 else helpful_K

    def _gains(self, label: Tensor, loss_K: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """[K] products of each loss's gradient in ``weights`` with that of the held-out loss ``label``, summed over ranks."""
        aim_P = summed(_flat(torch.autograd.grad(label, weights, allow_unused=True), weights), self.training)
        u_K = torch.zeros_like(loss_K, requires_grad=True)
        slope_P = _flat(torch.autograd.grad(loss_K, weights, u_K, create_graph=True, allow_unused=True), weights)
        (gain_K,) = torch.autograd.grad((slope_P * aim_P).sum(), u_K)
        return gain_K

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        losses = self._losses(student, teacher, batch)
        if not self.training or self.weight_K is None:
            return {term: loss_U.sum() for term, loss_U in losses.items()}
        weights = self.weight_K.split([len(loss_U) for loss_U in losses.values()])
        return {term: (weight_U * loss_U).sum() for (term, loss_U), weight_U in zip(losses.items(), weights, strict=True)}

    def _losses(self, student: Features, teacher: Features, batch: Batch) -> dict[str, Tensor]:
        """Term -> [U] its loss of each decision."""
        logits, losses = vectors(student, self.key, batch), {}
        if self.hard:
            losses["hard"] = self.hard * hard_losses(logits, batch, self.shape)
        if self.soft:
            answers = vectors(teacher, self.key, batch)
            losses["soft"] = self.soft * soft_losses(logits, answers, batch, self.shape, self.now(self.temperature))
        return losses


def _flat(slopes: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor:
    """[P] float32: one vector of the gradients of ``weights``, 0 where there is none."""
    return torch.cat(
        [(torch.zeros_like(weight) if slope is None else slope).flatten().float() for slope, weight in zip(slopes, weights, strict=True)]
    )
