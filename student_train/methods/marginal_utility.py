"""Few of the teacher's hidden numbers: of few blocks, few tokens of a row, few neurons.

Shapes: B rows, T tokens, S tokens (keys), H heads, U tokens that are kept, W width, M neurons that are kept.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from online.batch import Batch, Features, dense, narrowed, take
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods.base import LayerMap, Method, Stages, Terms, check_site, layer_pairs
from student_train.methods.losses import mse, projection, unit_count, vectors


class MarginalUtility(Method):
    """sum_l MSE of (H_s W)[c, n] and H_t[c, n]: hidden states at the chosen tokens c, and of these the chosen neurons n.

    Liu, Meng, Lin, Wang, Zhou, "Marginal Utility Diminishes: Exploring the Minimum Knowledge for BERT Knowledge Distillation", ACL
    2021, arXiv 2106.05691. What a student gains from hidden states grows ever more slowly with their amount, which is cut in three ways:

    - *Depth*: few pairs of ``layers``, the last blocks of the student; in the paper they learn from blocks evenly spaced below the
      teacher's 8th, 10th or 12th, such as [[6, 8]] for 6 of 12.
    - *Length*: ``tokens`` of each row, the leftmost, or with ``tokens_by: attention`` those that the teacher's [CLS] (last token, where it
      is causal) attends to most in the same block, mean over heads.
    - *Width*: the share ``width`` of the teacher's neurons, evenly spaced (``store.features.neurons``), or with ``width_by: magnitude``
      those of the largest absolute value at each token. W is learned where the widths differ, one for all blocks.

    Defaults are one setting of their code, 1 block, 10 tokens, a tenth of the neurons: a thousandth of all. A store keeps no more than
    that of leftmost tokens and even neurons. Attention and magnitudes choose while training, from all that a store then has to hold.

    The authors' code sets the neurons left out to 0 in the teacher alone, so that the student's are drawn to 0; here both
    sides leave them out. It divides by all entries and not by the kept ones, takes the largest magnitudes of a whole batch, and can
    pass over [SEP], which a batch does not tell apart. Their students are TinyBERT (with W) and ROSITA (as wide as the teacher). In a
    phase of its own follows ``kd`` with ``alpha: 1, temperature: 1``.

    Term ``hidden`` (tokens that are kept; sum over blocks, mean over the kept neurons).
    """

    paper = "Liu, Meng, Lin, Wang, Zhou 2021, arXiv 2106.05691"
    stages: ClassVar[Stages] = {"hidden states": ("hidden",), "prediction": ("soft",)}
    kinds = frozenset({"reads intermediate features", "has parameters of its own", "trains in several phases"})
    accepts = "any; a projection is learned where widths differ"

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        layers: LayerMap = "last",
        tokens: Annotated[int, Field(ge=1)] | None = 10,
        tokens_by: Literal["left", "attention"] = "left",
        width: Annotated[float, Field(gt=0, le=1)] = 0.1,
        width_by: Literal["uniform", "magnitude"] = "uniform",
    ) -> None:
        blocks, kept = layer_pairs(layers, student, teacher, lowest=0), max(1, round(width * teacher.width))
        attends = tokens_by == "attention"
        if attends and tokens is None:
            raise ValueError("tokens_by: attention chooses some of a row's tokens: give tokens")
        if attends:
            check_site("attention_scores", teacher, teacher)
        positions = f"left{tokens}" if tokens is not None else "all"
        at, form = "all" if attends else positions, f"width{kept}" if width_by == "uniform" and kept < teacher.width else ""
        scores = {FeatureKey("attention_scores", max(1, t)) for _, t in blocks} if attends else set()
        super().__init__({FeatureKey("hidden", s, at) for s, _ in blocks}, {FeatureKey("hidden", t, at, form) for _, t in blocks} | scores)
        self.blocks, self.teacher, self.tokens, self.attends, self.width_by = blocks, teacher, tokens, attends, width_by
        self.positions, self.at, self.form, self.kept = positions, at, form, kept
        self.projection = projection(student.width, teacher.width)

    def counts(self, batch: Batch) -> Terms:
        return {"hidden": unit_count(batch, self.positions)}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        losses = []
        for s, t in self.blocks:
            mine_UW = vectors(student, FeatureKey("hidden", s, self.at), batch)
            theirs_UW = vectors(teacher, FeatureKey("hidden", t, self.at, self.form), batch)
            if self.attends:
                chosen_U = self._attended(dense(teacher, FeatureKey("attention_scores", max(1, t))), batch)[batch.mask]
                mine_UW, theirs_UW = mine_UW[chosen_U], theirs_UW[chosen_U]
            losses.append(mse(*self._neurons(self.projection(mine_UW), theirs_UW)).sum())
        return {"hidden": torch.stack(losses).sum()}

    def _attended(self, scores_BHTS: Tensor, batch: Batch) -> Tensor:
        """[B, T] bool: the tokens of each row that its [CLS] attends to most; all of a row that has no more."""
        assert self.tokens is not None
        of_queries = scores_BHTS.float().transpose(1, 2).flatten(2)
        scores_BHS = take(of_queries, batch, "last" if self.teacher.causal else "first").unflatten(1, (self.teacher.heads, -1))
        attention_BS = scores_BHS.masked_fill(~batch.mask[:, None], -torch.inf).softmax(-1).mean(1).masked_fill(~batch.mask, -1)
        top = attention_BS.topk(min(self.tokens, attention_BS.shape[1]), -1).indices
        return torch.zeros_like(batch.mask).scatter(1, top, True) & batch.mask

    def _neurons(self, mine_UW: Tensor, theirs_UW: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides [U, M] with the neurons that are kept; those of the teacher may be no more than that already."""
        if self.width_by == "uniform":
            return narrowed(mine_UW, self.kept), theirs_UW
        largest_UM = theirs_UW.abs().topk(self.kept, -1).indices
        return mine_UW.gather(-1, largest_UM), theirs_UW.gather(-1, largest_UM)
