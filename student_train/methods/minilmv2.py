"""MiniLMv2: relations among queries, among keys and among values of one block."""

from math import gcd
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from online.batch import Batch, Features
from store.shape import ModelShape
from student_train.methods.base import LayerMap, Method, Stages, Terms, Weight, block_keys, check_site, check_weights, layer_pairs
from student_train.methods.losses import map_kl, of_blocks, relation, shared_pairs, unit_count


class MiniLMv2(Method):
    """sum_x a_x KL(R_t || R_s), R = softmax(X X^T / sqrt(d_r)) of X in {Q, K, V}, heads joined and split into A_r relation heads.

    Wang, Bao, Huang, Dong, Wei, "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained
    Transformers", Findings of ACL 2021, arXiv 2012.15828, section 3.1. Neither heads nor widths of the two models need agree.
    Large teachers do better with an upper-middle block (section 3.2; BERT-large 21, RoBERTa-large 19): ``layers: [[6, 21]]``.
    The mean over tokens is of the whole batch, not of each row. Queries and keys are read before rotary embedding and head
    norm, which the paper does not cover. With grouped-query attention the key and value relations split fewer columns.

    ``relation_heads`` must divide every width that is read on both sides. By default it is the largest such number up to
    four times the teacher's heads: the paper's 48 for base, 64 for large teachers.

    Terms ``query``, ``key``, ``value``: sum over query tokens (and layers), mean over relation heads.
    """

    paper = "Wang, Bao, Huang, Dong, Wei 2021, arXiv 2012.15828"
    stages: ClassVar[Stages] = {"pretraining": ("attention",)}
    kinds = frozenset({"reads intermediate features"})
    accepts = "any heads; widths that relation_heads divides"

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        layers: LayerMap = "last",
        relation_heads: Annotated[int, Field(ge=1)] | None = None,
        query: Weight = 1.0,
        key: Weight = 1.0,
        value: Weight = 1.0,
    ) -> None:
        check_weights("minilmv2", query, key, value)
        weights = {site: weight for site, weight in (("query", query), ("key", key), ("value", value)) if weight}
        for site in weights:
            check_site(site, student, teacher)
        blocks = layer_pairs(layers, student, teacher)
        super().__init__(*block_keys(list(weights), blocks))
        widths = {
            f"{side} {site}": shape.width_of(site) for side, shape in (("student", student), ("teacher", teacher)) for site in weights
        }
        shared = gcd(*widths.values())
        if relation_heads is None:
            relation_heads = max(heads for heads in range(1, min(4 * teacher.heads, shared) + 1) if shared % heads == 0)
        if shared % relation_heads:
            found = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise ValueError(f"relation_heads: expected a number that divides all widths, found {relation_heads} for {found}")
        self.blocks, self.student, self.teacher = blocks, student, teacher
        self.relation_heads, self.weights = relation_heads, weights

    def counts(self, batch: Batch) -> Terms:
        count = unit_count(batch, "all")
        return dict.fromkeys(self.weights, count)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        losses: dict[str, list[torch.Tensor]] = {site: [] for site in self.weights}
        for pair in self.blocks:
            seen = shared_pairs(batch, self.student, self.teacher, pair)
            for site, weight in self.weights.items():
                student_BHTS, teacher_BHTS = (
                    relation(x_BTW, self.relation_heads, batch) for x_BTW in of_blocks(student, teacher, site, pair)
                )
                losses[site].append(weight * map_kl(student_BHTS, teacher_BHTS, seen))
        return {site: torch.stack(terms).sum() for site, terms in losses.items()}
