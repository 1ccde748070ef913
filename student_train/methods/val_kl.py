"""Relations among values by KL divergence."""

from typing import ClassVar

import torch

from online.batch import Batch, Features
from store.shape import ModelShape
from student_train.methods.base import LayerMap, Method, Stages, Terms, block_keys, check_equal, check_site, layer_pairs
from student_train.methods.losses import map_kl, of_blocks, relation, shared_pairs, unit_count


class ValKL(Method):
    """sum_l KL(softmax(V_t V_t^T / sqrt(d_t)) || softmax(V_s V_s^T / sqrt(d_s))) of every value head, over layer pairs.

    The objective Val-KL of Wang, Weissweiler, Schuetze, Plank, "How to Distill your BERT", ACL 2023, arXiv 2305.15032,
    section 2 (after MiniLM's value relation). The paper's code has no mask; here padding is neither key nor query,
    and a causal model's relation looks back only.

    Term ``value``: sum over query tokens and layers, mean over heads. Both models need as many key-value heads; their
    widths may differ.
    """

    paper = "Wang, Weissweiler, Schuetze, Plank 2023, arXiv 2305.15032"
    stages: ClassVar[Stages] = {"intermediate": ("attention",), "prediction": ("soft", "hard")}
    kinds = frozenset({"reads intermediate features", "trains in several phases"})
    accepts = "as many key-value heads, any width"

    def __init__(self, student: ModelShape, teacher: ModelShape, *, layers: LayerMap = "uniform") -> None:
        check_site("value", student, teacher)
        check_equal("numbers of key-value heads", student.kv_heads, teacher.kv_heads, "minilmv2 splits values into relation_heads instead")
        blocks = layer_pairs(layers, student, teacher)
        super().__init__(*block_keys(["value"], blocks))
        self.blocks, self.student, self.teacher = blocks, student, teacher

    def counts(self, batch: Batch) -> Terms:
        return {"value": unit_count(batch, "all")}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        losses = []
        for pair in self.blocks:
            student_BHTS, teacher_BHTS = (
                relation(value_BTW, self.student.kv_heads, batch) for value_BTW in of_blocks(student, teacher, "value", pair)
            )
            losses.append(map_kl(student_BHTS, teacher_BHTS, shared_pairs(batch, self.student, self.teacher, pair)))
        return {"value": torch.stack(losses).sum()}
