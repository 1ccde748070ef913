"""Hard labels of clozes, learned with the language-model head.

Shapes: B rows, C classes.
"""

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from online.batch import IGNORED, Batch, Features
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods.base import Method, Stages, Terms, check_site
from student_train.methods.losses import vectors
from student_train.methods.task_loss import row_labels

CLOZE = FeatureKey("lm_logits", positions="labels")
"""Of the one masked token of each row."""


class ClozeLoss(Method):
    """CE(y, softmax of the masked word's logits over the C words that stand for classes).

    Schick, Schuetze, "Exploiting Cloze Questions for Few Shot Text Classification and Natural Language Inference" (PET), EACL 2021,
    arXiv 2001.07676, section 3: the softmax is over the classes' words alone, so that all others are free; their auxiliary
    language-model loss is ``lm_loss`` on other rows. ``lm_loss`` on the clozes themselves takes the softmax over the whole vocabulary.

    Needs no teacher: with it a masked language model becomes the teacher of a task without losing its head, as GLMD needs it.

    Term ``hard``: sum over labelled rows.
    """

    paper = "Schick, Schuetze 2021, arXiv 2001.07676"
    stages: ClassVar[Stages] = {"task": ("hard",)}
    accepts = "any with a masked-LM head"
    needs_teacher = False

    def __init__(self, student: ModelShape, teacher: ModelShape | None) -> None:
        check_masked_lm(student, None)
        super().__init__({CLOZE}, reads_labels=True)
        self.shape, self.reads_clozes = student, True

    def counts(self, batch: Batch) -> Terms:
        return {"hard": (row_labels(batch, self.shape) != IGNORED).sum().float()}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        labels_B = row_labels(batch, self.shape)
        return {"hard": F.cross_entropy(cloze_logits(student, batch), labels_B, ignore_index=IGNORED, reduction="sum")}


def check_masked_lm(student: ModelShape, teacher: ModelShape | None) -> None:
    """Refuse models that do not fill in a masked word."""
    check_site("lm_logits", student, teacher)
    for side, shape in (("student", student), ("teacher", teacher)):
        if shape is not None and shape.head != "masked_lm":
            raise ValueError(f"a cloze is filled in by a {side} with head masked_lm, found {shape.head}")


def cloze_logits(features: Features, batch: Batch) -> Tensor:
    """[B, C] float32 logits of the classes' words at each row's masked token."""
    assert batch.verbalisers is not None
    return vectors(features, CLOZE, batch)[:, batch.verbalisers]
