"""Attention distributions by KL divergence.

Shapes: B rows, H heads, T tokens (queries), S tokens (keys).
"""

from typing import ClassVar

import torch

from online.batch import Batch, Features
from store.shape import ModelShape
from student_train.methods.base import LayerMap, Method, Stages, Terms, block_keys, check_equal, check_site, layer_pairs
from student_train.methods.losses import map_kl, of_blocks, shared_pairs, unit_count


class AttKL(Method):
    """sum_l KL(softmax(A_t) || softmax(A_s)) over layer pairs, A the scaled scores before the softmax.

    The objective Att-KL of Wang, Weissweiler, Schuetze, Plank, "How to Distill your BERT", ACL 2023, arXiv 2305.15032,
    section 2 (after MiniLM). The paper's code divides by B H T with padding counted, and clamps the student's
    probabilities to 1e-7; here rows of padding do not count and log-softmax needs no clamp. The student's probabilities
    come from its scores, so they are free of attention dropout.

    Term ``attention``: sum over query tokens and layers, mean over heads. Both models need as many query heads.
    """

    paper = "Wang, Weissweiler, Schuetze, Plank 2023, arXiv 2305.15032"
    stages: ClassVar[Stages] = {"intermediate": ("attention",), "prediction": ("soft", "hard")}
    kinds = frozenset({"reads intermediate features", "trains in several phases"})
    accepts = "as many attention heads, any width"

    def __init__(self, student: ModelShape, teacher: ModelShape, *, layers: LayerMap = "uniform") -> None:
        check_site("attention_scores", student, teacher)
        check_equal("numbers of attention heads", student.heads, teacher.heads)
        blocks = layer_pairs(layers, student, teacher)
        super().__init__(*block_keys(["attention_scores"], blocks))
        self.blocks, self.student, self.teacher = blocks, student, teacher

    def counts(self, batch: Batch) -> Terms:
        return {"attention": unit_count(batch, "all")}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        losses = []
        for pair in self.blocks:
            student_BHTS, teacher_BHTS = of_blocks(student, teacher, "attention_scores", pair)
            losses.append(map_kl(student_BHTS, teacher_BHTS, shared_pairs(batch, self.student, self.teacher, pair)))
        return {"attention": torch.stack(losses).sum()}
