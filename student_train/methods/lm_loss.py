"""Language-model cross entropy.

Shapes: N labelled tokens, V words.
"""

from functools import partial
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from online.batch import Batch, Features
from online.words import Words, each
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods.base import Method, Stages, Terms, check_site
from student_train.methods.losses import unit_count, word_logits


class LMLoss(Method):
    """Cross entropy of the words at the labelled tokens: masked words or, in causal rows, the next word.

    Needs no teacher: it pretrains students, and is the hard term beside ``lm_kd``. The masked form is task 1 of Devlin,
    Chang, Lee, Toutanova, "BERT", NAACL 2019, arXiv 1810.04805.

    Term ``words``: sum over labelled tokens; its mean is the logarithm of the perplexity.
    """

    paper = "Devlin, Chang, Lee, Toutanova 2019, arXiv 1810.04805"
    stages: ClassVar[Stages] = {"pretraining": ("hard",)}
    accepts = "any with a language-model head"
    needs_teacher = False

    def __init__(self, student: ModelShape, teacher: ModelShape | None) -> None:
        check_site("lm_logits", student, None)
        key = FeatureKey("lm_logits", positions="labels")
        super().__init__({key})
        self.key = key

    def counts(self, batch: Batch) -> Terms:
        return {"words": unit_count(batch, "labels")}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        return {"words": word_loss(word_logits(student, self.key, batch), batch)}


def word_loss(words: Words, batch: Batch) -> Tensor:
    """0-d sum of the cross entropy of the labelled tokens' words."""
    if batch.token_labels is None:
        return words.logits.sum()  # N = 0: the sum of nothing, still differentiable
    return each(partial(F.cross_entropy, reduction="none"), words, batch.token_labels[batch.labelled]).sum()
