"""Knowledge distillation from a cloze: what two masked language models think of the classes' words.

Shapes: B rows, C classes.
"""

from typing import ClassVar, Literal

from online.batch import Batch, Features
from store.shape import ModelShape
from student_train.methods.base import Method, Stages, Temperature, Terms, check_vocabularies
from student_train.methods.cloze_loss import CLOZE, check_masked_lm, cloze_logits
from student_train.methods.losses import kl, mse, unit_count


class ClozeKD(Method):
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)), z the masked word's logits of the C words that stand for classes.

    L_st of GLMD, its last phase, after two of ``lm_kd`` (L_sp): Tan, Tam, Wang, Gong, Zhao, Zhang, Tang, "Are Intermediate Layers and
    Labels Really Necessary? A General Language Model Distillation Method", Findings of ACL 2023, arXiv 2306.06625, section 3, with T = 1
    and no hard labels (``cloze_loss`` beside it is their ablation). GLM sums log-softmax over the tokens of an answer of several; here
    an answer is one token, and z its logit, of which the softmax over classes is the same. Its code takes the cross entropy, which at
    T = 1 has the same gradient and is larger by the teacher's entropy.

    ``divergence: mse`` is their other ablation: the squared difference of z as it is, mean over classes; without T.

    Term ``soft``: sum over rows.
    """

    paper = "Tan et al. 2023, arXiv 2306.06625"
    stages: ClassVar[Stages] = {"pretraining": ("soft",), "task words": ("soft",), "task": ("soft",)}
    kinds = frozenset({"trains in several phases"})
    accepts = "any with a masked-LM head and the teacher's vocabulary"

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        temperature: Temperature = 1.0,
        divergence: Literal["kl", "mse"] = "kl",
    ) -> None:
        check_masked_lm(student, teacher)
        check_vocabularies(student, teacher)
        if divergence == "mse" and temperature != 1:
            raise ValueError(f"temperature: the mse of logits has none, found {temperature}; leave it out")
        super().__init__({CLOZE}, {CLOZE})
        self.temperature, self.divergence = temperature, divergence
        self.reads_clozes = True

    def counts(self, batch: Batch) -> Terms:
        return {"soft": unit_count(batch, "row")}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        student_BC, teacher_BC = cloze_logits(student, batch), cloze_logits(teacher, batch)
        if self.divergence == "mse":
            return {"soft": mse(student_BC, teacher_BC).sum()}
        return {"soft": kl(student_BC, teacher_BC, self.now(self.temperature)).sum()}
