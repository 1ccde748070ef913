"""Hidden states of one token of each row."""

from typing import ClassVar, Literal

import torch

from online.batch import Batch, Features
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods.base import LayerMap, Method, Stages, Terms, layer_pairs
from student_train.methods.losses import mse, projection, unit_count, vectors


class HidCLS(Method):
    """sum_l MSE(h_s[CLS] W, h_t[CLS]) over layer pairs, W learned where the widths differ.

    The objective Hid-CLS of Wang, Weissweiler, Schuetze, Plank, "How to Distill your BERT", ACL 2023, arXiv 2305.15032,
    section 2. One W serves all layers, as in the paper; its code has none and needs equal widths. The code sums over
    rows; here the mean is over rows and width. The token is the first, or the last in causal students,
    whose first token has seen nothing.

    Term ``hidden``: sum over rows and layers, mean over width. Block 0 in ``layers`` is the embedding output.
    """

    paper = "Wang, Weissweiler, Schuetze, Plank 2023, arXiv 2305.15032"
    stages: ClassVar[Stages] = {"intermediate": ("hidden",), "prediction": ("soft", "hard")}
    kinds = frozenset({"reads intermediate features", "has parameters of its own", "trains in several phases"})
    accepts = "any; a projection is learned where widths differ"

    def __init__(
        self, student: ModelShape, teacher: ModelShape, *, layers: LayerMap = "uniform", positions: Literal["first", "last"] | None = None
    ) -> None:
        at = positions or ("last" if student.causal else "first")
        pairs = [(FeatureKey("hidden", s, at), FeatureKey("hidden", t, at)) for s, t in layer_pairs(layers, student, teacher, lowest=0)]
        super().__init__((s for s, _ in pairs), (t for _, t in pairs))
        self.pairs, self.positions = pairs, at
        self.projection = projection(student.width, teacher.width)

    def counts(self, batch: Batch) -> Terms:
        return {"hidden": unit_count(batch, self.positions)}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        losses = [mse(self.projection(vectors(student, s, batch)), vectors(teacher, t, batch)).sum() for s, t in self.pairs]
        return {"hidden": torch.stack(losses).sum()}
