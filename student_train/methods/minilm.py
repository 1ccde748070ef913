"""MiniLM: self-attention distributions and value relations of one block."""

from typing import ClassVar

import torch

from online.batch import Batch, Features
from store.shape import ModelShape
from student_train.methods.base import (
    LayerMap,
    Method,
    Stages,
    Terms,
    Weight,
    block_keys,
    check_equal,
    check_site,
    check_weights,
    layer_pairs,
)
from student_train.methods.losses import map_kl, of_blocks, relation, shared_pairs, unit_count


class MiniLM(Method):
    """L_AT + L_VR: KL of the attention distributions, and of the value relations softmax(V V^T / sqrt(d)), of the last blocks.

    Wang, Wei, Dong, Bao, Yang, Zhou, "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of
    Pre-Trained Transformers", NeurIPS 2020, arXiv 2002.10957, sections 3.1 and 3.2. The attention mask enters both softmaxes.
    The paper divides by heads and tokens of each row; here the mean is over the tokens of the whole batch. The last
    feed-forward layer learns nothing from it, so the student needs fine-tuning.

    Terms ``attention`` and ``value``: sum over query tokens (and layers), mean over heads. Both models need as many query
    heads (``attention``) and as many key-value heads (``value``); their widths may differ.
    """

    paper = "Wang, Wei, Dong, Bao, Yang, Zhou 2020, arXiv 2002.10957"
    stages: ClassVar[Stages] = {"pretraining": ("attention",)}
    kinds = frozenset({"reads intermediate features"})
    accepts = "as many attention and key-value heads, any width"

    def __init__(
        self, student: ModelShape, teacher: ModelShape, *, layers: LayerMap = "last", attention: Weight = 1.0, value: Weight = 1.0
    ) -> None:
        check_weights("minilm", attention, value)
        sites = [site for site, weight in (("attention_scores", attention), ("value", value)) if weight]
        for site in sites:
            check_site(site, student, teacher)
        if attention:
            check_equal("numbers of attention heads", student.heads, teacher.heads, "minilmv2 needs no equal heads")
        if value:
            check_equal("numbers of key-value heads", student.kv_heads, teacher.kv_heads, "minilmv2 needs no equal heads")
        blocks = layer_pairs(layers, student, teacher)
        super().__init__(*block_keys(sites, blocks))
        self.blocks, self.student, self.teacher = blocks, student, teacher
        self.attention, self.value = attention, value

    def counts(self, batch: Batch) -> Terms:
        count = unit_count(batch, "all")
        return {name: count for name, weight in (("attention", self.attention), ("value", self.value)) if weight}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        losses: dict[str, list[torch.Tensor]] = {"attention": [], "value": []}
        for pair in self.blocks:
            seen = shared_pairs(batch, self.student, self.teacher, pair)
            if self.attention:
                student_BHTS, teacher_BHTS = of_blocks(student, teacher, "attention_scores", pair)
                losses["attention"].append(self.attention * map_kl(student_BHTS, teacher_BHTS, seen))
            if self.value:
                student_BHTS, teacher_BHTS = (
                    relation(value_BTW, self.student.kv_heads, batch) for value_BTW in of_blocks(student, teacher, "value", pair)
                )
                losses["value"].append(self.value * map_kl(student_BHTS, teacher_BHTS, seen))
        return {name: torch.stack(terms).sum() for name, terms in losses.items() if terms}
