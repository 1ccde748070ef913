"""Hidden states of every token."""

from typing import ClassVar

import torch

from online.batch import Batch, Features
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods.base import LayerMap, Method, Stages, Terms, layer_pairs
from student_train.methods.losses import mse, projection, unit_count, vectors


class HidSeq(Method):
    """sum_l MSE(h_s W, h_t) over layer pairs and tokens, W learned where the widths differ.

    The objective Hid-Seq of Wang, Weissweiler, Schuetze, Plank, "How to Distill your BERT", ACL 2023, arXiv 2305.15032,
    section 2. One W serves all layers, as in the paper. The paper's code counts padding too; here only tokens count.
    In pre-norm models a hidden state is the raw residual stream, whose size grows with depth.

    Term ``hidden``: sum over tokens and layers, mean over width. Block 0 in ``layers`` is the embedding output.
    """

    paper = "Wang, Weissweiler, Schuetze, Plank 2023, arXiv 2305.15032"
    stages: ClassVar[Stages] = {"intermediate": ("hidden",), "prediction": ("soft", "hard")}
    kinds = frozenset({"reads intermediate features", "has parameters of its own", "trains in several phases"})
    accepts = "any; a projection is learned where widths differ"

    def __init__(self, student: ModelShape, teacher: ModelShape, *, layers: LayerMap = "uniform") -> None:
        pairs = [(FeatureKey("hidden", s), FeatureKey("hidden", t)) for s, t in layer_pairs(layers, student, teacher, lowest=0)]
        super().__init__((s for s, _ in pairs), (t for _, t in pairs))
        self.pairs = pairs
        self.projection = projection(student.width, teacher.width)

    def counts(self, batch: Batch) -> Terms:
        return {"hidden": unit_count(batch, "all")}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        losses = [mse(self.projection(vectors(student, s, batch)), vectors(teacher, t, batch)).sum() for s, t in self.pairs]
        return {"hidden": torch.stack(losses).sum()}
