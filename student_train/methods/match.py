"""The generic method: any site of the student against the same site of the teacher.

Shapes: B rows, T tokens (queries), S tokens (keys), W width, H heads.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from online.batch import Batch, Features, dense
from store.features import LAYERED, FeatureKey
from store.shape import ModelShape
from student_train.methods.base import LayerMap, Method, Stages, Temperature, Terms, check_equal, check_site, layer_pairs
from student_train.methods.losses import MASKED, cosine, kl, pair_count, relation, shared_pairs, soft_ce, unit_count, vectors

Distance = Literal["mse", "huber", "cosine", "kl", "ce"]
MAPS = ("attention_scores", "attention_probs")


class Match(Method):
    """sum_l distance(x_s W, x_t) of one site over layer pairs, or of its relation X X^T / sqrt(width) among a row's tokens.

    Of no single paper: the common form of intermediate matches, as in the match table of TextBrewer (Yang et al., ACL 2020
    demonstrations, arXiv 2002.12620). Distances are over the last axis:

    - ``mse``, ``huber`` (threshold 1): mean over width; ``cosine``: 1 - cos.
    - ``kl``, ``ce``: T^2 times KL, or cross entropy, of softmax(x / T). Attention scores become probabilities in it, so
      ``attention_probs`` are refused: a second softmax would flatten them.

    ``layers`` maps blocks (unset: ``uniform``); sites without blocks take none. ``projection: linear`` learns a W for each
    pair of layers. ``form: relation`` needs no equal widths. Relations and attention compare only tokens that see each
    other; attention needs as many query heads.

    Term: the site's name. Sum over tokens, rows, or (``mse`` and ``huber`` of attention and relations) pairs of tokens, and
    over layers; mean over heads.
    """

    paper = "none of its own; the match table of Yang et al. 2020, arXiv 2002.12620"
    stages: ClassVar[Stages] = {"any": ("embedding", "attention", "hidden", "soft")}
    kinds = frozenset({"reads intermediate features", "has parameters of its own"})
    accepts = "any; widths or heads as the site and its projection need"

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        site: str,
        distance: Distance = "mse",
        layers: LayerMap | None = None,
        positions: str | None = None,
        form: Literal["values", "relation"] = "values",
        projection: Literal["none", "linear"] = "none",
        temperature: Temperature = 1.0,
    ) -> None:
        maps = form == "relation" or site in MAPS
        soft = distance in ("kl", "ce")
        expected = _positions(site, student, maps)
        at = positions or expected[0]
        if site not in LAYERED:
            if layers is not None:
                raise ValueError(f"layers: {site} has no layers; leave the option out")
            blocks = [(student.layers, teacher.layers)]
            keys = [(FeatureKey(site, None, at), FeatureKey(site, None, at))]
        else:
            blocks = layer_pairs(layers or "uniform", student, teacher, lowest=0 if site == "hidden" else 1)
            keys = [(FeatureKey(site, s, at), FeatureKey(site, t, at)) for s, t in blocks]
        super().__init__((s for s, _ in keys), (t for _, t in keys))

        check_site(site, student, teacher)
        if at not in expected:
            raise ValueError(f"positions: expected {' or '.join(expected)} for {site} ({form}), found {at}")
        if temperature != 1 and not soft:
            raise ValueError(f"temperature: only the distances kl and ce have one, found {distance}")
        if maps and projection == "linear":
            raise ValueError("projection: attention and relations have no width to project; expected none")
        if site in MAPS:
            check_equal("numbers of attention heads", student.heads, teacher.heads)
            if form == "relation":
                raise ValueError(f"form: {site} is a relation already; expected values")
            if soft and site == "attention_probs":
                raise ValueError(f"distance: {distance} takes a softmax itself; expected site: attention_scores")
        self.projections = nn.ModuleList()
        if not maps:
            widths = student.width_of(site), teacher.width_of(site)
            if projection == "none":
                check_equal(f"widths of {site}", *widths, "set projection: linear, or form: relation")
            if soft and widths[1] == 1:
                raise ValueError(f"distance: {distance} compares distributions, found one number in {site}; expected mse")
            self.projections.extend(nn.Linear(*widths) if projection == "linear" else nn.Identity() for _ in keys)
        self.student, self.teacher, self.blocks, self.keys = student, teacher, blocks, keys
        self.site, self.positions, self.form, self.maps = site, at, form, maps
        self.distance, self.temperature = distance, temperature

    def counts(self, batch: Batch) -> Terms:
        if self.maps and self.distance in ("mse", "huber"):
            return {self.site: pair_count(batch, self.student, self.teacher, self.blocks)}
        return {self.site: unit_count(batch, self.positions)}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        losses = []
        if self.maps:
            for pair, (s, t) in zip(self.blocks, self.keys, strict=True):
                x_s, x_t = dense(student, s), dense(teacher, t)
                if self.form == "relation":
                    x_s, x_t = relation(x_s, 1, batch), relation(x_t, 1, batch)
                losses.append(self._map_loss(x_s, x_t, shared_pairs(batch, self.student, self.teacher, pair)))
        else:
            for projection, (s, t) in zip(self.projections, self.keys, strict=True):
                losses.append(self._distance(projection(vectors(student, s, batch)), vectors(teacher, t, batch)).sum())
        return {self.site: torch.stack(losses).sum()}

    def _map_loss(self, student_BHTS: Tensor, teacher_BHTS: Tensor, seen_B1TS: Tensor) -> Tensor:
        unseen = MASKED if self.distance in ("kl", "ce") else 0
        student_BHTS, teacher_BHTS = (x_BHTS.float().masked_fill(~seen_B1TS, unseen) for x_BHTS in (student_BHTS, teacher_BHTS))
        if self.distance in ("mse", "huber"):
            return self._elements(student_BHTS, teacher_BHTS).mean(1).sum()
        return self._distance(student_BHTS, teacher_BHTS).masked_fill(~seen_B1TS.any(-1), 0).mean(1).sum()

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.distance == "kl":
            return kl(student, teacher, self.now(self.temperature))
        if self.distance == "ce":
            return soft_ce(student, teacher, self.now(self.temperature))
        if self.distance == "cosine":
            return cosine(student, teacher)
        return self._elements(student, teacher).mean(-1)

    def _elements(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (F.mse_loss if self.distance == "mse" else F.huber_loss)(student, teacher, reduction="none")


def _positions(site: str, student: ModelShape, maps: bool) -> tuple[str, ...]:
    """Positions at which ``site`` can be compared, the default first."""
    if maps:
        return ("all",)
    if site == "task_logits":
        return ("labels", "all") if student.head == "token_classification" else ("row",)
    return ("all", "first", "last", "mean", "masked", "labels")
