"""LRC-BERT: hidden states near those of the teacher in angle, and far from those of the batch's other rows.

Shapes: B rows, R rows of all ranks, T tokens, W width.
"""

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from online.batch import Batch, Features
from store.shape import ModelShape
from student_train.gather import gathered, longest, own
from student_train.methods.base import LayerMap, Method, Stages, Terms, block_keys, layer_pairs
from student_train.methods.losses import of_blocks, unit_count, zero_padded


class LRCBERT(Method):
    """sum_l [ g(i, i) + mean_j (2 - (g(i, j) - g(i, i))) / 2 ] over layer pairs, g(i, j) = 1 - cos(h_s(i) W, h_t(j)), j the other rows.

    COS-NCE of Fu, Zhou, Yang, Tang, Liu, Liu, Li, "LRC-BERT: Latent-representation Contrastive Knowledge Distillation for Natural
    Language Understanding", AAAI 2021, arXiv 2012.07335, equation 1. The negatives of a row are the teacher's states of all
    other rows of the micro-batch, over all ranks; accumulation makes them fewer. The cosine of two rows is the mean over
    token positions that both have, which the paper leaves open; GLMKD counts padding too. One W without bias serves all
    layers, also where widths agree.

    The paper trains in two stages: this alone, then 1 : 1 : 3 with soft labels at T = 1.1 and hard labels, which is ``kd`` with
    ``weight: 4, alpha: 0.25, temperature: 1.1``. That the first stage takes 80% of the steps is unverified.

    ``perturbation`` takes each step at embeddings that are moved, token by token, by one unit vector along the gradient of the
    whole loss of the phase (section 3.4): two passes of the student a step, one of them without weight gradients. Teacher and
    store know nothing of it. Ranks that shard the student refuse it.

    Term ``contrast``: sum over rows and layers.
    """

    paper = "Fu, Zhou, Yang, Tang, Liu, Liu, Li 2021, arXiv 2012.07335"
    stages: ClassVar[Stages] = {"task contrastive": ("hidden",), "task": ("hidden", "soft", "hard")}
    kinds = frozenset(
        {
            "reads intermediate features",
            "changes what the student computes",
            "has parameters of its own",
            "compares rows of a batch",
            "trains in several phases",
        }
    )
    accepts = "any heads, any width; under perturbation not a sharded student"
    least_rows = 2

    def __init__(self, student: ModelShape, teacher: ModelShape, *, layers: LayerMap = "uniform", perturbation: bool = True) -> None:
        blocks = layer_pairs(layers, student, teacher, lowest=0)
        super().__init__(*block_keys(["hidden"], blocks))
        self.blocks, self.perturbs = blocks, perturbation
        self.projection = nn.Linear(student.width, teacher.width, bias=False)

    def counts(self, batch: Batch) -> Terms:
        return {"contrast": unit_count(batch, "row")}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        room = longest(batch.mask.shape[1], self.training) - batch.mask.shape[1]
        mask_BT = F.pad(batch.mask.float(), (0, room))
        shared_BR = mask_BT @ gathered(mask_BT, self.training).T
        own_rows = own(mask_BT, self.training)
        itself_BR = torch.zeros_like(shared_BR, dtype=torch.bool)
        itself_BR[:, own_rows] = torch.eye(len(mask_BT), dtype=torch.bool, device=mask_BT.device)
        other_BR = (shared_BR > 0) & ~itself_BR
        losses = []
        for pair in self.blocks:
            student_BTW, teacher_BTW = (zero_padded(x_BTW, batch) for x_BTW in of_blocks(student, teacher, "hidden", pair))
            anchor_BTW, target_BTW = (
                F.pad(F.normalize(x_BTW, dim=-1) * batch.mask[..., None], (0, 0, 0, room))
                for x_BTW in (self.projection(student_BTW), teacher_BTW)
            )
            cosine_BR = anchor_BTW.flatten(1) @ gathered(target_BTW, self.training).flatten(1).T / shared_BR.clamp(min=1)
            pull_B = 1 - cosine_BR[itself_BR]
            gap_BR = (1 - cosine_BR - pull_B[:, None]).masked_fill(~other_BR, 0)
            losses.append(pull_B + 1 - gap_BR.sum(1) / other_BR.sum(1).clamp(min=1) / 2)
        return {"contrast": torch.stack(losses).sum()}
