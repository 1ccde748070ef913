"""Contrast of rows over their hidden states, with memory banks (CoDIR, CRD).

Shapes: B rows, R rows of all ranks, N rows that are trained on, K negatives, D numbers of an embedding, W width of all layers side by side.
"""

from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from online.batch import IGNORED, Batch, Features
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.gather import gathered, summed
from student_train.methods.base import LayerMap, Method, Stages, Terms, layer_pairs, row_token
from student_train.methods.losses import unit_count, vectors
from student_train.step import Survey

WHY = "contrast draws a row's negatives from rows of other classes"
INSTEAD = "rkd, and sentence with similarity, compare rows without looking at labels"


class Contrast(Method):
    """NCE of a row's two embeddings against those of rows of other classes, from memory banks: of both models as anchors, mean of both.

    CoDIR: Sun, Gan, Cheng, Fang, Wang, Liu, "Contrastive Distillation on Intermediate Representations for Language Model Compression",
    EMNLP 2020, arXiv 2009.14167; the loss is CRD's (Tian, Krishnan, Isola, ICLR 2020, arXiv 1910.10699, equation 18). A model's hidden
    states of one token of each layer, side by side, become an embedding of length one through a linear map; both maps are learned
    and dropped afterwards. Of an anchor v and a bank entry m, P = exp(m . v / T) / (N Z), Z the mean of exp(m . v / T) in the first
    batch, and the loss is -log h(P_row) - sum over the negatives of log(1 - h(P)), h(P) = P / (P + K / N). N cancels out of it. The
    authors' codes add 1e-7 in the logarithms, which log-sigmoids need not.

    The banks hold an embedding of each row that is trained on, by each model: random at first, then ``momentum`` times themselves and
    the rest of the row's latest embedding, at length one. ``negatives`` rows are drawn anew for a row in each step, with replacement
    where there are fewer of other classes. Banks and Z are the same on all ranks and part of a checkpoint; each micro-batch updates the
    banks. Held-out rows have no entry: their embedding by the other model stands for it.

    ``layers: uniform`` with ``pooling: first`` is CoDIR's code (its teacher blocks of 12 are 1, 3, ... 11, where ours are 2, 4, ... 12:
    give pairs for those), ``mean`` its paper; ``layers: all``, every state of both with the embedding outputs, is the objective
    Hid-CLS-Contrast of Wang et al. 2023, arXiv 2305.15032. Beside KL and CE both codes divide this by the rows of a batch once more:
    their weight w is ``weight: w / B`` beside ``kd``.

    Rows need a class each. Term ``contrast`` (rows).
    """

    paper = "Sun, Gan, Cheng, Fang, Wang, Liu 2020, arXiv 2009.14167"
    stages: ClassVar[Stages] = {"task": ("hidden", "soft", "hard")}
    kinds = frozenset({"reads intermediate features", "has parameters of its own", "compares rows of a batch"})
    accepts = "any heads, any width; rows with a class each"

    numbers: Tensor
    student_bank: Tensor
    teacher_bank: Tensor
    normalisers: Tensor

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        layers: LayerMap | Literal["all"] = "uniform",
        pooling: Literal["first", "last", "mean"] | None = None,
        dimensions: Annotated[int, Field(ge=1)] = 128,
        negatives: Annotated[int, Field(ge=1)] = 100,
        temperature: Annotated[float, Field(ge=0.01)] = 0.07,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5,
    ) -> None:
        if student.head == "classification" and student.labels == 1:
            raise ValueError(f"{WHY}, and scores have none; {INSTEAD}")
        if student.head in ("multiple_choice", "token_classification"):
            raise ValueError(f"{WHY}, and rows of {student.head} have none; {INSTEAD}")
        if layers == "all":
            student_blocks, teacher_blocks = list(range(student.layers + 1)), list(range(teacher.layers + 1))
        else:
            pairs = layer_pairs(layers, student, teacher, lowest=0)
            student_blocks, teacher_blocks = [s for s, _ in pairs], [t for _, t in pairs]
        at = pooling or row_token(student)
        of_student, of_teacher = ([FeatureKey("hidden", block, at) for block in blocks] for blocks in (student_blocks, teacher_blocks))
        super().__init__(of_student, of_teacher, reads_labels=True)
        self.of_student, self.of_teacher = of_student, of_teacher
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        self.student_embedding = nn.Linear(len(of_student) * student.width, dimensions)
        self.teacher_embedding = nn.Linear(len(of_teacher) * teacher.width, dimensions)

    def survey(self, rows: Survey) -> None:
        classes = np.unique(rows.labels)
        if np.isnan(classes).any() or (classes != np.floor(classes)).any():
            found = "rows without a label" if np.isnan(classes).any() else "scores"
            raise ValueError(f"{WHY}: expected a class for each row that is trained on, found {found}; {INSTEAD}")
        if len(classes) < 2:
            raise ValueError(f"{WHY}: expected two classes or more, found one; {INSTEAD}")
        self._by_class = np.argsort(rows.labels, kind="stable")
        self._classes = rows.labels[self._by_class]
        device = self.student_embedding.weight.device
        self.register_buffer("numbers", torch.from_numpy(rows.numbers).to(device), persistent=False)
        size = len(rows.numbers), self.student_embedding.out_features
        widest = (3 / size[1]) ** 0.5  # of uniform numbers that make a vector of length one on average
        for place, bank in enumerate(("student_bank", "teacher_bank")):
            random = self.moment.draws("contrast banks", place).uniform(-widest, widest, size).astype(np.float32)
            self.register_buffer(bank, torch.from_numpy(random).to(device))
        self.register_buffer("normalisers", torch.zeros(2, dtype=torch.float64, device=device))

    def counts(self, batch: Batch) -> Terms:
        return {"contrast": unit_count(batch, "row")}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        student_BW, teacher_BW = (
            torch.cat([vectors(features, key, batch) for key in keys], -1)
            for features, keys in ((student, self.of_student), (teacher, self.of_teacher))
        )
        student_BD = F.normalize(self.student_embedding(student_BW), dim=-1)
        teacher_BD = F.normalize(self.teacher_embedding(teacher_BW), dim=-1)
        places_B, drawn_BK = torch.searchsorted(self.numbers, batch.rows), self._drawn(batch)
        losses = []
        for anchor, (anchor_BD, other_BD, bank_ND) in enumerate(
            ((student_BD, teacher_BD, self.teacher_bank), (teacher_BD, student_BD, self.student_bank))
        ):
            row_BD = bank_ND[places_B] if self.training else other_BD.detach()
            entries_BkD = torch.cat([row_BD[:, None], bank_ND[drawn_BK]], 1)
            scores_Bk = (entries_BkD @ anchor_BD[..., None]).squeeze(-1) / self.temperature
            logits_Bk = scores_Bk - (self._normaliser(anchor, scores_Bk) * self.negatives).log().float()
            losses.append(-F.logsigmoid(logits_Bk[:, 0]) - F.logsigmoid(-logits_Bk[:, 1:]).sum(1))
        if self.training:
            self._remember(places_B, student_BD.detach(), teacher_BD.detach())
        return {"contrast": torch.stack(losses).mean(0).sum()}

    def _drawn(self, batch: Batch) -> Tensor:
        """[B, K] places in the banks of rows of other classes; they depend on the step and the row alone."""
        labels_B = torch.full_like(batch.rows, IGNORED) if batch.row_labels is None else batch.row_labels
        drawn = []
        for row, label in zip(batch.rows.tolist(), labels_B.tolist(), strict=True):
            first, last = np.searchsorted(self._classes, label, "left"), np.searchsorted(self._classes, label, "right")
            others = len(self._classes) - (last - first)
            generator = self.moment.draws(f"contrast {row}", self.moment.step)
            chosen = generator.choice(others, self.negatives, replace=self.negatives > others)
            drawn.append(self._by_class[np.where(chosen < first, chosen, chosen + last - first)])
        return torch.from_numpy(np.stack(drawn)).to(batch.rows.device)

    def _normaliser(self, anchor: int, scores_Bk: Tensor) -> Tensor:
        """0-d float64 Z of the student's (0) or the teacher's (1) anchors; of the first batch over all ranks, 0 in the buffer before."""
        if self.normalisers[anchor] > 0:
            return self.normalisers[anchor].clone()
        exponentials_Bk = scores_Bk.detach().double().exp()
        number = torch.full_like(self.normalisers[anchor], exponentials_Bk.numel())
        found = summed(exponentials_Bk.sum(), self.training) / summed(number, self.training)
        if self.training:
            self.normalisers[anchor] = found
        return found

    @torch.no_grad()
    def _remember(self, places_B: Tensor, student_BD: Tensor, teacher_BD: Tensor) -> None:
        """Update the banks with the rows of all ranks; one that comes twice, where epochs meet, with the mean of both."""
        known_U, which_R = gathered(places_B, True).unique(return_inverse=True)
        for bank_ND, latest_BD in ((self.student_bank, student_BD), (self.teacher_bank, teacher_BD)):
            latest_RD = gathered(latest_BD, True)
            latest_UD = F.normalize(latest_RD.new_zeros(len(known_U), latest_RD.shape[1]).index_add_(0, which_R, latest_RD), dim=-1)
            bank_ND[known_U] = F.normalize(self.momentum * bank_ND[known_U] + (1 - self.momentum) * latest_UD, dim=-1)
