"""TinyBERT: embeddings, hidden states and attention scores of mapped blocks.

Shapes: B rows, U tokens that are not padding, L pairs of blocks.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from online.batch import Batch, Features
from store.features import FeatureKey
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
from student_train.methods.losses import map_mse, mse, of_blocks, pair_count, row_map_mse, row_means, shared_pairs, unit_count, vectors

EMBEDDING = FeatureKey("hidden", 0)


class TinyBERT(Method):
    """MSE(E_s W_e, E_t) + sum_l MSE(H_s W_h, H_t) + sum_l MSE(A_s, A_t): TinyBERT's distillation of the layers.

    Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", Findings of EMNLP 2020, arXiv
    1909.10351, equations 7 to 9; A are scaled scores before the softmax. W_e and W_h are learned also where the widths agree,
    W_h for all layers, and are dropped afterwards. The authors' code has one W for both, a bias in it (kept here), and
    counts padding (not counted here).

    The paper trains in sequence, never at once: this method in a general phase and a task phase, then, in a phase of its
    own, the prediction layer (equation 10): ``kd`` with ``alpha: 1, temperature: 1``.

    Terms ``embedding`` and ``hidden`` (tokens, mean over width) and ``attention`` (pairs of tokens, mean over heads; both
    models need as many query heads), summed over layers.
    """

    paper = "Jiao et al. 2020, arXiv 1909.10351"
    stages: ClassVar[Stages] = {
        "general": ("embedding", "attention", "hidden"),
        "task intermediate": ("embedding", "attention", "hidden"),
        "task prediction": ("soft",),
    }
    kinds = frozenset({"reads intermediate features", "has parameters of its own", "trains in several phases"})
    accepts = "as many attention heads, any width"

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        layers: LayerMap = "uniform",
        embedding: Weight = 1.0,
        hidden: Weight = 1.0,
        attention: Weight = 1.0,
    ) -> None:
        check_weights("tinybert", embedding, hidden, attention)
        blocks = layer_pairs(layers, student, teacher)
        super().__init__(*layer_keys(student, teacher, blocks, embedding, hidden, attention))
        self.blocks, self.student, self.teacher = blocks, student, teacher
        self.embedding, self.hidden, self.attention = embedding, hidden, attention
        self.embedding_projection = nn.Linear(student.width, teacher.width) if embedding else None
        self.hidden_projection = nn.Linear(student.width, teacher.width) if hidden else None

    def counts(self, batch: Batch) -> Terms:
        terms, tokens = {}, unit_count(batch, "all")
        if self.embedding:
            terms["embedding"] = tokens
        if self.hidden:
            terms["hidden"] = tokens
        if self.attention:
            terms["attention"] = pair_count(batch, self.student, self.teacher, self.blocks)
        return terms

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        terms = {}
        if self.embedding_projection is not None:
            projected = self.embedding_projection(vectors(student, EMBEDDING, batch))
            terms["embedding"] = self.embedding * mse(projected, vectors(teacher, EMBEDDING, batch)).sum()
        if self.hidden_projection is not None:
            losses = [
                mse(
                    self.hidden_projection(vectors(student, FeatureKey("hidden", s), batch)),
                    vectors(teacher, FeatureKey("hidden", t), batch),
                ).sum()
                for s, t in self.blocks
            ]
            terms["hidden"] = self.hidden * torch.stack(losses).sum()
        if self.attention:
            losses = [
                map_mse(*of_blocks(student, teacher, "attention_scores", pair), shared_pairs(batch, self.student, self.teacher, pair))
                for pair in self.blocks
            ]
            terms["attention"] = self.attention * torch.stack(losses).sum()
        return terms


def layer_keys(
    student: ModelShape, teacher: ModelShape, blocks: list[tuple[int, int]], embedding: float, hidden: float, attention: float
) -> tuple[set[FeatureKey], set[FeatureKey]]:
    """What terms of these weights read of the student and of the teacher.

    Raises:
        ValueError: attention of two models with other numbers of heads, or of one that has none to read.
    """
    if attention:
        check_site("attention_scores", student, teacher)
        check_equal("numbers of attention heads", student.heads, teacher.heads, "attention: 0 leaves this term out")
    sites = [site for site, weight in (("hidden", hidden), ("attention_scores", attention)) if weight]
    student_keys, teacher_keys = block_keys(sites, blocks)
    below = {EMBEDDING} if embedding else set()
    return student_keys | below, teacher_keys | below


def row_embedding(student: Features, teacher: Features, batch: Batch, projection: nn.Module) -> Tensor:
    """[B] MSE of embeddings, mean over a row's tokens."""
    return row_means(mse(projection(vectors(student, EMBEDDING, batch)), vectors(teacher, EMBEDDING, batch)), batch)


def row_hidden(student: Features, teacher: Features, batch: Batch, blocks: list[tuple[int, int]], projection: nn.Module) -> Tensor:
    """[L, B] MSE of hidden states of each pair of blocks, mean over a row's tokens."""
    losses = [
        mse(projection(vectors(student, FeatureKey("hidden", s), batch)), vectors(teacher, FeatureKey("hidden", t), batch))
        for s, t in blocks
    ]
    return torch.stack([row_means(loss_U, batch) for loss_U in losses])


def row_attention(
    student: Features, teacher: Features, batch: Batch, blocks: list[tuple[int, int]], shapes: tuple[ModelShape, ModelShape]
) -> Tensor:
    """[L, B] MSE of attention scores of each pair of blocks, mean over a row's seen pairs of tokens and over heads."""
    losses = [row_map_mse(*of_blocks(student, teacher, "attention_scores", pair), shared_pairs(batch, *shapes, pair)) for pair in blocks]
    return torch.stack(losses)
