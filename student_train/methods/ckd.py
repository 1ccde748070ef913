"""CKD: how the words of a row, and the layers of a word, lie to each other.

Shapes: B rows, T and S tokens, K tokens of a window, U tokens that are not padding, L layers, W width.
"""

from collections.abc import Callable
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from online.batch import Batch, Features
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.methods.angles import angle_cosines, distances
from student_train.methods.base import LayerMap, Method, Stages, Terms, Weight, block_keys, check_weights, layer_pairs
from student_train.methods.losses import MASKED, kl, of_blocks, unit_count, vectors, zero_padded
from student_train.methods.structure import companions

Relation = Callable[[Tensor], Tensor]
Difference = Callable[[Tensor, Tensor], Tensor]


class CKD(Method):
    """Relations of words (WR) and of the layers of a word (LTR), each in pairs and in triplets.

    Park, Kim, Yang, "Distilling Linguistic Context for Language Model Compression", EMNLP 2021, arXiv 2109.08359, section 4:

    - ``word_pair``: KL(softmax_j cos(h_t(i), h_t(j)) || the same of the student) over the other words j of the row;
    - ``word_triple``: squared difference of cos of the angle at word i between words j and k of the ``window`` around it;
    - ``layer_pair``, ``layer_triple``: the same over the layers of one word, triplets without a window.

    Words are tokens. ``uniform`` and ``last`` begin at the embedding output, as published (``emb+skip``); pairs are taken as they
    are. The weights are published with the denominators of the authors' code, which these are: sums over the pairs (i, j), the
    triplets (i, j, k) and the layers, those with i twice included. Padding and window places beyond the row, where that code
    repeats the row's end, do not count; a packed row's documents do not see each other. The authors' values are NaN on today's
    torch (0 times -inf), their gradients are these.

    The weights depend on the task, as word_pair and layer_pair / word_triple and layer_triple (authors' code, 6 blocks): CoLA and
    RTE 1 / 10 (the defaults), SST-2 100 / 1000, MNLI 100 / 1, QNLI 10 / 1, QQP 10 / 10, MRPC 1 / 1, STS-B 0.1 / 0.1; that code then
    leaves those of layers at 1, whatever it was told. The total adds cross entropy with the teacher's softmax at T without T^2:
    ``kd`` with ``alpha: 1`` and ``weight: 1 / T^2``.

    Terms: ``word_pair`` (pairs), ``word_triple`` (triplets), ``layer_pair`` and ``layer_triple`` (tokens, mean over pairs or triplets of
    layers); means over layers.
    """

    paper = "Park, Kim, Yang 2021, arXiv 2109.08359"
    stages: ClassVar[Stages] = {"task": ("embedding", "hidden", "soft")}
    kinds = frozenset({"reads intermediate features"})
    accepts = "any heads, any width"

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        layers: LayerMap = "uniform",
        word_pair: Weight = 1.0,
        word_triple: Weight = 10.0,
        layer_pair: Weight = 1.0,
        layer_triple: Weight = 10.0,
        window: Annotated[int, Field(ge=3)] = 21,
    ) -> None:
        check_weights("ckd", word_pair, word_triple, layer_pair, layer_triple)
        blocks = layer_pairs(layers, student, teacher, lowest=0)
        if isinstance(layers, str):
            blocks = [(0, 0), *blocks]
        if (layer_pair or layer_triple) and len(blocks) < 3:
            raise ValueError(
                f"layers: layer_pair and layer_triple compare the distances of a layer to two others: expected 3 or more pairs, or both 0; "
                f"found {len(blocks)}"
            )
        if window % 2 == 0:
            raise ValueError(f"window: expected an odd number, as many words on each side, found {window}")
        super().__init__(*block_keys(["hidden"], blocks))
        self.blocks, self.reach = blocks, window // 2
        weights = {"word_pair": word_pair, "word_triple": word_triple, "layer_pair": layer_pair, "layer_triple": layer_triple}
        self.weights = {term: weight for term, weight in weights.items() if weight}

    def counts(self, batch: Batch) -> Terms:
        found = {}
        if "word_pair" in self.weights:
            found["word_pair"] = companions(batch).sum().float()
        if "word_triple" in self.weights:
            found["word_triple"] = _window(batch, self.reach)[1].sum(-1).square().sum().float()
        return {term: found.get(term, unit_count(batch, "all")) for term in self.weights}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        terms: Terms = {}
        if "word_pair" in self.weights:
            terms["word_pair"] = self._words(student, teacher, batch, lambda x_BTW: _cosines(x_BTW, companions(batch)), kl)
        if "word_triple" in self.weights:
            near_TK, seen_BTK = _window(batch, self.reach)
            seen_BTKK = seen_BTK[..., :, None] & seen_BTK[..., None, :]
            terms["word_triple"] = self._words(
                student, teacher, batch, lambda x_BTW: _window_angles(x_BTW, near_TK).masked_fill(~seen_BTKK, 0), _square
            )
        if "layer_pair" in self.weights:
            terms["layer_pair"] = self._layers(student, teacher, batch, _cosines, kl) / len(self.blocks) ** 2
        if "layer_triple" in self.weights:
            terms["layer_triple"] = self._layers(student, teacher, batch, _angles, _square) / len(self.blocks) ** 3
        return {term: self.weights[term] * total for term, total in terms.items()}

    def _words(self, student: Features, teacher: Features, batch: Batch, relation: Relation, difference: Difference) -> Tensor:
        """0-d sum of the differences of relations among the tokens of each row, mean over layers."""
        totals = []
        for pair in self.blocks:
            student_B, teacher_B = (relation(zero_padded(x_BTW, batch)) for x_BTW in of_blocks(student, teacher, "hidden", pair))
            totals.append(difference(student_B, teacher_B).sum())
        return torch.stack(totals).mean()

    def _layers(self, student: Features, teacher: Features, batch: Batch, relation: Relation, difference: Difference) -> Tensor:
        """0-d sum over tokens of the difference of relations among their layers."""
        student_U, teacher_U = (
            relation(torch.stack([vectors(features, FeatureKey("hidden", pair[side]), batch) for pair in self.blocks], 1))
            for side, features in enumerate((student, teacher))
        )
        return difference(student_U, teacher_U).sum()


def _cosines(x_NPW: Tensor, seen_NPP: Tensor | None = None) -> Tensor:
    """[N, P, P] cosines of each point with the others that it sees; MASKED with itself and those it does not see."""
    unit_NPW = F.normalize(x_NPW, dim=-1)
    hidden_NPP = torch.eye(x_NPW.shape[1], dtype=torch.bool, device=x_NPW.device)
    return (unit_NPW @ unit_NPW.mT).masked_fill(hidden_NPP if seen_NPP is None else hidden_NPP | ~seen_NPP, MASKED)


def _square(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square()


def _angles(x_NPW: Tensor) -> Tensor:
    """[N, P, P, P] cosines of the angles at the first point between the second and the third."""
    sides_NPP = distances(x_NPW)
    return angle_cosines(sides_NPP[:, :, :, None], sides_NPP[:, :, None, :], sides_NPP[:, None, :, :])


def _window(batch: Batch, reach: int) -> tuple[Tensor, Tensor]:
    """[T, K] int64 tokens around each token, and [B, T, K] bool where they are of its row."""
    tokens = batch.mask.shape[1]
    reach = min(reach, tokens - 1)
    steps_K = torch.arange(-reach, reach + 1, device=batch.mask.device)
    near_TK = torch.arange(tokens, device=batch.mask.device)[:, None] + steps_K
    inside_TK = (near_TK >= 0) & (near_TK < tokens)
    near_TK = near_TK.clamp(0, tokens - 1)
    return near_TK, companions(batch).gather(2, near_TK.expand(len(batch.mask), -1, -1)) & inside_TK


def _window_angles(x_BTW: Tensor, near_TK: Tensor) -> Tensor:
    """[B, T, K, K] cosines of the angles at each token between two tokens around it; [B, T, T] distances are all it keeps of vectors."""
    rows, tokens, _ = x_BTW.shape
    sides_BTT = distances(x_BTW)
    near_BTK = sides_BTT.gather(2, near_TK.expand(rows, -1, -1))
    across_TKK = near_TK[:, :, None] * tokens + near_TK[:, None, :]
    across_BTKK = sides_BTT.flatten(1).gather(1, across_TKK.flatten().expand(rows, -1)).unflatten(1, across_TKK.shape)
    return angle_cosines(near_BTK[..., :, None], near_BTK[..., None, :], across_BTKK)
