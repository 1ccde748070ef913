"""Attention scores by squared difference.

Shapes: B rows, H heads, T tokens (queries), S tokens (keys).
"""

from typing import ClassVar

import torch

from online.batch import Batch, Features
from store.shape import ModelShape
from student_train.methods.base import LayerMap, Method, Stages, Terms, block_keys, check_equal, check_site, layer_pairs
from student_train.methods.losses import map_mse, of_blocks, pair_count, shared_pairs


class AttMSE(Method):
    """sum_l MSE(A_s, A_t) over layer pairs, A the scaled scores before the softmax.

    The objective Att-MSE of Wang, Weissweiler, Schuetze, Plank, "How to Distill your BERT", ACL 2023, arXiv 2305.15032,
    section 2 (after TinyBERT, equation 7). The paper's code sets masked scores to 0 and keeps them, with the
    rows of padding, in the mean; here only pairs of tokens that see each other count.

    Term ``attention``: sum over pairs and layers, mean over heads. Both models need as many query heads.
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
        return {"attention": pair_count(batch, self.student, self.teacher, self.blocks)}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        losses = []
        for pair in self.blocks:
            student_BHTS, teacher_BHTS = of_blocks(student, teacher, "attention_scores", pair)
            losses.append(map_mse(student_BHTS, teacher_BHTS, shared_pairs(batch, self.student, self.teacher, pair)))
        return {"attention": torch.stack(losses).sum()}
