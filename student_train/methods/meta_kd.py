"""Meta-KD: TinyBERT's losses, in which a row counts by how typical it is of its domains and how right the teacher is on it.

Shapes: B rows, D domains, C classes, W the teacher's width.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from online.batch import IGNORED, Batch, Features
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.gather import summed
from student_train.methods.base import LayerMap, Method, Stages, Temperature, Terms, Weight, check_equal, check_weights, layer_pairs
from student_train.methods.losses import kl, vectors
from student_train.methods.task_loss import label_count, row_labels, task_key
from student_train.methods.tinybert import layer_keys, row_attention, row_embedding, row_hidden
from student_train.step import Step

POOLED = FeatureKey("final", positions="mean")


class MetaKD(Method):
    """sum_i lambda_i [MSE(E_s W_e, E_t) + sum_l MSE(H_s W_h, H_t) + sum_l MSE(A_s, A_t) + T^2 KL(p_t || p_s)]_i over rows i.

    Pan, Wang, Qiu, Zhang, Li, Huang, "Meta-KD: A Meta Knowledge Distillation Framework for Language Model Compression across
    Domains", ACL 2021, arXiv 2012.01266. The losses are TinyBERT's, each a mean over the row's tokens or seen pairs of tokens, and

        lambda_i = (1 + t_i) / (1 + exp((1 - p_t(y_i))^2))
        t_i = own cos(x_i, c(d_i, y_i)) + (1 - own) mean over d != d_i of cos(x_i, c(d, y_i))

    with x the mean of the teacher's last hidden states and c(d, y) the mean x of the rows of domain d and class y. lambda is that of the
    authors' code; the paper's text is unverified. t is the typicality score of an earlier paper of theirs (Wang, Qiu, Huang, He, EMNLP
    2020, arXiv 2003.13003; unverified too): the code has no classes, one cosine with the mean of the other domains' c, own = 1/2, and
    x of a BERT that was not fine-tuned. In the code lambda weighs the layers alone; the soft labels follow in a phase of their own.

    What is ours: the teacher is any that a store holds. The paper's is trained across domains with these t as weights and with a loss
    that mixes domains up; its learned features of domains, and the loss that passes them on, are left out. c are running means over
    the rows trained on so far, of all ranks; a domain and class without rows has no part in t. While the student is measured they
    stay. So the student learns from all domains, where the paper makes one for each, with t from all of them.

    Terms ``embedding``, ``hidden``, ``attention`` (mean over heads) and ``soft``, each over rows with a label; others have no lambda.
    """

    paper = "Pan, Wang, Qiu, Zhang, Li, Huang 2021, arXiv 2012.01266"
    stages: ClassVar[Stages] = {"task": ("embedding", "attention", "hidden", "soft")}
    kinds = frozenset(
        {"reads intermediate features", "has parameters of its own", "changes its loss as it goes", "compares rows of a batch"}
    )
    accepts = "rows of classes, of several domains; as many attention heads, any width"

    sums: Tensor
    """[D, C, W] of the pooled states of the rows seen so far."""
    seen: Tensor
    """[D, C] how many."""

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        domains: Annotated[int, Field(ge=2)],
        own: Annotated[float, Field(ge=0, le=1)] = 0.5,
        layers: LayerMap = "uniform",
        temperature: Temperature = 1.0,
        embedding: Weight = 1.0,
        hidden: Weight = 1.0,
        attention: Weight = 1.0,
        soft: Weight = 1.0,
    ) -> None:
        check_weights("meta_kd", embedding, hidden, attention, soft)
        key, blocks = task_key(student), layer_pairs(layers, student, teacher)
        if student.head != "classification" or student.labels == 1:
            found = f"{student.head} with {student.labels} label{'s' * (student.labels > 1)}"
            raise ValueError(f"a row counts by the teacher's probability of its class: expected a head of classification, found {found}")
        check_equal("heads", student.head, teacher.head)
        check_equal("numbers of labels", student.labels, teacher.labels)
        student_keys, teacher_keys = layer_keys(student, teacher, blocks, embedding, hidden, attention)
        super().__init__(student_keys | ({key} if soft else set()), teacher_keys | {key, POOLED}, reads_labels=True)
        self.reads_domains, self.domains = True, domains
        self.key, self.blocks, self.student, self.teacher = key, blocks, student, teacher
        self.own, self.temperature = own, temperature
        self.embedding, self.hidden, self.attention, self.soft = embedding, hidden, attention, soft
        self.embedding_projection = nn.Linear(student.width, teacher.width) if embedding else None
        self.hidden_projection = nn.Linear(student.width, teacher.width) if hidden else None
        self.register_buffer("sums", torch.zeros(domains, student.labels, teacher.width))
        self.register_buffer("seen", torch.zeros(domains, student.labels))

    def counts(self, batch: Batch) -> Terms:
        weights = {"embedding": self.embedding, "hidden": self.hidden, "attention": self.attention, "soft": self.soft}
        return {term: label_count(batch, self.student) for term, weight in weights.items() if weight}

    @torch.no_grad()
    def prepare(self, step: Step) -> None:
        labels_B = row_labels(step.batch, self.student)
        assert step.batch.domains is not None
        known_B = labels_B != IGNORED
        place_B = step.batch.domains[known_B] * self.student.labels + labels_B[known_B]
        member_BP = F.one_hot(place_B, self.seen.numel()).float()
        sums_PW = member_BP.T @ vectors(step.teacher, POOLED, step.batch)[known_B]
        self.sums += summed(sums_PW, self.training).view_as(self.sums)
        self.seen += summed(member_BP.sum(0), self.training).view_as(self.seen)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        weight_B, terms = self.row_weights(teacher, batch), {}
        if self.embedding_projection is not None:
            loss_B = row_embedding(student, teacher, batch, self.embedding_projection)
            terms["embedding"] = self.embedding * (weight_B * loss_B).sum()
        if self.hidden_projection is not None:
            loss_LB = row_hidden(student, teacher, batch, self.blocks, self.hidden_projection)
            terms["hidden"] = self.hidden * (weight_B * loss_LB).sum()
        if self.attention:
            loss_LB = row_attention(student, teacher, batch, self.blocks, (self.student, self.teacher))
            terms["attention"] = self.attention * (weight_B * loss_LB).sum()
        if self.soft:
            loss_B = kl(vectors(student, self.key, batch), vectors(teacher, self.key, batch), self.now(self.temperature))
            terms["soft"] = self.soft * (weight_B * loss_B).sum()
        return terms

    @torch.no_grad()
    def row_weights(self, teacher: Features, batch: Batch) -> Tensor:
        """[B] lambda; 0 in rows without a label."""
        assert batch.domains is not None
        labels_B = row_labels(batch, self.student)
        known_B, class_B = labels_B != IGNORED, labels_B.clamp(min=0)
        right_B = vectors(teacher, self.key, batch).softmax(-1).gather(1, class_B[:, None]).squeeze(1)
        there_BD = self.seen.T[class_B] > 0
        means_BDW = self.sums.transpose(0, 1)[class_B]  # a cosine does not ask how long they are
        near_BD = F.cosine_similarity(vectors(teacher, POOLED, batch)[:, None], means_BDW, dim=-1).masked_fill(~there_BD, 0)
        own_BD = F.one_hot(batch.domains, self.seen.shape[0]).bool()
        others_B = near_BD.masked_fill(own_BD, 0).sum(1) / (there_BD & ~own_BD).sum(1).clamp(min=1)
        typical_B = self.own * near_BD[own_BD] + (1 - self.own) * others_B
        return known_B * (1 + typical_B) / (1 + (1 - right_B).square().exp())
