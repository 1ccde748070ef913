"""DistilBERT: soft word predictions, masked-LM loss and cosine of the last hidden states."""

from typing import ClassVar, Literal

from online.batch import Batch, Features
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods.base import (
    Method,
    Stages,
    Temperature,
    Terms,
    Weight,
    check_equal,
    check_site,
    check_vocabularies,
    check_weights,
)
from student_train.methods.divergences import word_kl
from student_train.methods.lm_loss import word_loss
from student_train.methods.losses import cosine, unit_count, vectors, word_logits

FINAL = FeatureKey("final")
LABELS = FeatureKey("lm_logits", positions="labels")


class DistilBERT(Method):
    """a_ce T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + a_mlm CE(y, z_s) + a_cos (1 - cos(h_s, h_t)).

    Sanh, Debut, Chaumond, Wolf, "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter", EMC^2 at
    NeurIPS 2019, arXiv 1910.01108, section 2. Defaults are those of the authors' code (README), which averages each term
    over its tokens as here. The soft term is over all tokens or, as its --restrict_ce_to_mask, the ``masked`` ones. In
    causal models ``mlm`` is next-word cross entropy, as in DistilGPT2.

    Terms ``soft`` (tokens), ``mlm`` (labelled tokens), ``cosine`` (tokens, after the last norm; both models need the
    same width, for the paper has no projection).
    """

    paper = "Sanh, Debut, Chaumond, Wolf 2019, arXiv 1910.01108"
    stages: ClassVar[Stages] = {"pretraining": ("hidden", "soft", "hard")}
    kinds = frozenset({"reads intermediate features"})
    accepts = "the teacher's width, language-model head and vocabulary"

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        positions: Literal["all", "masked"] = "all",
        temperature: Temperature = 2.0,
        soft: Weight = 5.0,
        mlm: Weight = 2.0,
        cosine: Weight = 1.0,
    ) -> None:
        check_weights("distilbert", soft, mlm, cosine)
        logits = FeatureKey("lm_logits", positions=positions)
        if soft:
            check_site("lm_logits", student, teacher)
            check_equal("heads", student.head, teacher.head)
            check_vocabularies(student, teacher)
        if mlm:
            check_site("lm_logits", student, None)
        if cosine:
            check_equal("widths", student.width, teacher.width, "cosine: 0 leaves this term out")
        student_keys = [key for key, weight in ((logits, soft), (LABELS, mlm), (FINAL, cosine)) if weight]
        super().__init__(student_keys, [key for key in student_keys if key != LABELS])
        self.logits, self.temperature = logits, temperature
        self.soft, self.mlm, self.cosine = soft, mlm, cosine

    def counts(self, batch: Batch) -> Terms:
        terms = {}
        if self.soft:
            terms["soft"] = unit_count(batch, self.logits.positions)
        if self.mlm:
            terms["mlm"] = unit_count(batch, "labels")
        if self.cosine:
            terms["cosine"] = unit_count(batch, "all")
        return terms

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        terms = {}
        if self.soft:
            mine, other = (word_logits(side, self.logits, batch) for side in (student, teacher))
            terms["soft"] = self.soft * word_kl(mine, other, self.now(self.temperature)).sum()
        if self.mlm:
            terms["mlm"] = self.mlm * word_loss(word_logits(student, LABELS, batch), batch)
        if self.cosine:
            terms["cosine"] = self.cosine * cosine(vectors(student, FINAL, batch), vectors(teacher, FINAL, batch)).sum()
        return terms
