"""HRKD: TinyBERT's losses of each domain and layer, multiplied by ratios that a graph of the domains learns.

Shapes: B rows, R rows of all ranks, L layers, P domains that are present among the R rows, W the student's width.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from online.batch import Batch, Features
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.gather import gathered, own
from student_train.methods.base import LayerMap, Method, Stages, Terms, Weight, check_weights, layer_pairs
from student_train.methods.domain_graph import DomainGraph
from student_train.methods.losses import unit_count, vectors
from student_train.methods.tinybert import layer_keys, row_attention, row_embedding, row_hidden


class HRKD(Method):
    """sum_d r_0d MSE(E_s W_e, E_t)_d + sum_l r_ld [MSE(H_s W_h, H_t) + MSE(A_s, A_t)]_d over domains d and pairs of blocks l.

    Dong, Li, Shen, Qiu, "HRKD: Hierarchical Relational Knowledge Distillation for Cross-domain Language Model Compression", EMNLP 2021,
    arXiv 2110.08551; after the authors' code, the paper's text is unverified. The ratios r of a layer, which sum to 1, are those that
    ``DomainGraph`` makes of the student's own states there: the mean over the tokens of each row, then over the rows of each domain
    in the micro-batch, over all ranks.

    In the paper a step takes as many rows of each domain and adds up the domains' means. Here rows come as they do: each counts P times
    the ratio of its domain, with P the number of domains present, which is the same where each has as many rows. Ratios are among
    those present. The paper has a teacher for each domain; here one answers for all. Its prediction layer, all domains alike, is
    ``kd`` with ``alpha: 1`` beside this.

    The graph learns by the same loss as the student, so that domains in which the student comes closest to its teacher gain, and what
    cannot be learned loses. In the authors' code the optimiser is not given the graph: its weights stay as they were drawn. There
    each layer has a projection of its own, the graph sees projected states, and padding counts.

    Terms ``embedding``, ``hidden`` and ``attention`` (rows: mean over tokens and width, or over seen pairs and heads), summed over layers.
    """

    paper = "Dong, Li, Shen, Qiu 2021, arXiv 2110.08551"
    stages: ClassVar[Stages] = {"task": ("embedding", "attention", "hidden", "soft")}
    kinds = frozenset(
        {"reads intermediate features", "has parameters of its own", "changes its loss as it goes", "compares rows of a batch"}
    )
    accepts = "rows of several domains; as many attention heads, any width"

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        domains: Annotated[int, Field(ge=2)],
        layers: LayerMap = "uniform",
        graph_heads: Annotated[int, Field(ge=1)] = 8,
        published: bool = False,
        embedding: Weight = 1.0,
        hidden: Weight = 1.0,
        attention: Weight = 1.0,
    ) -> None:
        check_weights("hrkd", embedding, hidden, attention)
        blocks = layer_pairs(layers, student, teacher)
        student_keys, teacher_keys = layer_keys(student, teacher, blocks, embedding, hidden, attention)
        seen = ([0] if embedding else []) + ([s for s, _ in blocks] if hidden or attention else [])
        pooled = [FeatureKey("hidden", block, "mean") for block in seen]
        super().__init__(student_keys | set(pooled), teacher_keys)
        self.reads_domains, self.domains = True, domains
        self.blocks, self.student, self.teacher, self.pooled = blocks, student, teacher, pooled
        self.embedding, self.hidden, self.attention = embedding, hidden, attention
        self.embedding_projection = nn.Linear(student.width, teacher.width) if embedding else None
        self.hidden_projection = nn.Linear(student.width, teacher.width) if hidden else None
        self.graph = DomainGraph(len(pooled), domains, student.width, graph_heads, published)

    def counts(self, batch: Batch) -> Terms:
        weights = {"embedding": self.embedding, "hidden": self.hidden, "attention": self.attention}
        return {term: unit_count(batch, "row") for term, weight in weights.items() if weight}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        weight_LB, terms = self.row_weights(student, batch), {}
        of_blocks_LB = weight_LB[1:] if self.embedding else weight_LB
        if self.embedding_projection is not None:
            loss_B = row_embedding(student, teacher, batch, self.embedding_projection)
            terms["embedding"] = self.embedding * (weight_LB[0] * loss_B).sum()
        if self.hidden_projection is not None:
            loss_LB = row_hidden(student, teacher, batch, self.blocks, self.hidden_projection)
            terms["hidden"] = self.hidden * (of_blocks_LB * loss_LB).sum()
        if self.attention:
            loss_LB = row_attention(student, teacher, batch, self.blocks, (self.student, self.teacher))
            terms["attention"] = self.attention * (of_blocks_LB * loss_LB).sum()
        return terms

    def row_weights(self, student: Features, batch: Batch) -> Tensor:
        """[L, B] P times the ratio of each row's domain."""
        assert batch.domains is not None
        state_BLW = torch.stack([vectors(student, key, batch) for key in self.pooled], 1)
        state_RLW, domain_R = gathered(state_BLW, self.training), gathered(batch.domains, self.training)
        present_P, place_R = domain_R.unique(return_inverse=True)
        member_PR = F.one_hot(place_R).T.float()
        state_LPW = torch.einsum("pr,rlw->lpw", member_PR / member_PR.sum(1, keepdim=True), state_RLW)
        ratio_LP: Tensor = self.graph(state_LPW, present_P)
        return len(present_P) * ratio_LP[:, place_R[own(batch.domains, self.training)]]
