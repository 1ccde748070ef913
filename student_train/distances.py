"""How far a student is from its teacher, feature by feature: what a probe measures, without gradient and without weights of its own.

Plain distances compare numbers one to one, so they need equal widths. Pair-wise scaled ones compare what the tokens of a row are to each
other, X X^T / sqrt(d), and need none; GKD's figures 4 and 5 (Tan et al. 2023, arXiv 2306.06629) set both against the loss. That its
"pair-wise scaled" is this scaled dot product of MiniLM (Wang et al. 2020, arXiv 2002.10957) is unverified.

Shapes: B rows, T tokens (queries), S tokens (keys), H heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd

from torch import Tensor

from online.batch import Batch, Features, dense
from store.features import FeatureKey
from store.shape import ModelShape
from store.strict import did_you_mean
from student_train.methods.base import LayerMap, check_equal, check_site, check_vocabularies, layer_pairs
from student_train.methods.divergences import word_kl
from student_train.methods.kd import soft_loss
from student_train.methods.losses import map_mse, mse, relation, shared_pairs, unit_count, vectors, word_logits
from student_train.methods.task_loss import answer_count, task_key

GLMD_TEMPERATURE = 15.0
"""T of L_sp."""

Part = tuple[Tensor, Tensor]
"""What a batch adds to a distance: a sum, and how many values it is a sum of; 0-d both."""


@dataclass(frozen=True)
class Comparison:
    """One number of a probe."""

    distance: str
    student: ModelShape
    teacher: ModelShape
    student_key: FeatureKey
    teacher_key: FeatureKey
    blocks: tuple[int, int] | None = None
    """Of the student and of the teacher; None for what has no blocks."""
    temperature: float | None = None

    @property
    def name(self) -> str:
        """``hidden.2-4`` (block 2 of the student, 4 of the teacher), ``soft.T5``."""
        blocks = "" if self.blocks is None else f".{self.blocks[0]}-{self.blocks[1]}"
        return f"{self.distance}{blocks}{'' if self.temperature is None else f'.T{self.temperature:g}'}"

    def part(self, student: Features, teacher: Features, batch: Batch) -> Part:
        """Its share of a batch."""
        return DISTANCES[self.distance].part(self, student, teacher, batch)

    def seen(self, batch: Batch) -> Tensor:
        """[B, 1, T, S] bool: pairs of tokens that both blocks see."""
        return shared_pairs(batch, self.student, self.teacher, self.blocks or (0, 0))

    def heads(self, site: str) -> int:
        """Into how many parts each side's vectors are split, so that each side's heads lie whole in one."""
        if site == "query":
            return gcd(self.student.heads, self.teacher.heads)
        return gcd(self.student.kv_heads, self.teacher.kv_heads) if site in ("key", "value") else 1


@dataclass(frozen=True)
class Distance:
    """A kind of distance."""

    about: str
    site: str
    part: Callable[[Comparison, Features, Features, Batch], Part]
    check: Callable[[str, ModelShape, ModelShape], None]
    """Raises ValueError where two models do not have it."""
    layered: bool = True
    positions: str = "all"
    temperatures: tuple[float, ...] | None = ()
    """Those it is measured at; None: those of the recipe; empty: it has none."""


def _values(one: Comparison, student: Features, teacher: Features, batch: Batch) -> Part:
    """Squared differences, mean over the width, sum over tokens."""
    return mse(vectors(student, one.student_key, batch), vectors(teacher, one.teacher_key, batch)).sum(), unit_count(batch, "all")


def _relations(one: Comparison, student: Features, teacher: Features, batch: Batch) -> Part:
    """Squared differences of X X^T / sqrt(d), d the width of a part, mean over parts, sum over pairs of tokens."""
    heads, seen_B1TS = one.heads(one.student_key.site), one.seen(batch)
    student_BHTS, teacher_BHTS = (
        relation(dense(features, key), heads, batch) for features, key in ((student, one.student_key), (teacher, one.teacher_key))
    )
    return map_mse(student_BHTS, teacher_BHTS, seen_B1TS), seen_B1TS.sum()


def _maps(one: Comparison, student: Features, teacher: Features, batch: Batch) -> Part:
    """Squared differences of attention, mean over heads, sum over pairs of tokens."""
    seen_B1TS = one.seen(batch)
    return map_mse(*_attention(one, student, teacher, seen_B1TS), seen_B1TS), seen_B1TS.sum()


def _map_relations(one: Comparison, student: Features, teacher: Features, batch: Batch) -> Part:
    """The same of P P^T / sqrt(n), P what each of the n tokens of a row attends to."""
    seen_B1TS = one.seen(batch)
    scale_B111 = batch.lengths[:, None, None, None].sqrt()
    student_BHTT, teacher_BHTT = (p_BHTS @ p_BHTS.mT / scale_B111 for p_BHTS in _attention(one, student, teacher, seen_B1TS))
    return map_mse(student_BHTT, teacher_BHTT, seen_B1TS), seen_B1TS.sum()


def _attention(one: Comparison, student: Features, teacher: Features, seen_B1TS: Tensor) -> tuple[Tensor, Tensor]:
    """[B, H, T, S] of both sides, 0 where a pair is not seen; the mean of a side's heads where there are not as many on the other."""
    student_BHTS, teacher_BHTS = (
        dense(features, key).float().masked_fill(~seen_B1TS, 0)
        for features, key in ((student, one.student_key), (teacher, one.teacher_key))
    )
    if one.student.heads == one.teacher.heads:
        return student_BHTS, teacher_BHTS
    return student_BHTS.mean(1, keepdim=True), teacher_BHTS.mean(1, keepdim=True)


def _soft(one: Comparison, student: Features, teacher: Features, batch: Batch) -> Part:
    """T^2 KL of task logits (of scores the squared difference), sum over rows, groups or tokens."""
    logits, answers = vectors(student, one.student_key, batch), vectors(teacher, one.teacher_key, batch)
    return soft_loss(logits, answers, batch, one.student, one.temperature or 1.0), answer_count(batch, one.student)


def _words(one: Comparison, student: Features, teacher: Features, batch: Batch) -> Part:
    """T^2 KL of word logits, sum over tokens."""
    sides = word_logits(student, one.student_key, batch), word_logits(teacher, one.teacher_key, batch)
    return word_kl(*sides, one.temperature or 1.0).sum(), unit_count(batch, one.student_key.positions)


def _any_width(site: str, student: ModelShape, teacher: ModelShape) -> None:
    check_site(site, student, teacher)


def _equal_width(site: str, student: ModelShape, teacher: ModelShape) -> None:
    check_site(site, student, teacher)
    check_equal(
        f"widths of {site}", student.width_of(site), teacher.width_of(site), "the distance of the same name with _relation needs none"
    )


def _task_heads(site: str, student: ModelShape, teacher: ModelShape) -> None:
    check_site(site, student, teacher)
    check_equal("heads", student.head, teacher.head)
    check_equal("numbers of labels", student.labels, teacher.labels)


def _word_heads(site: str, student: ModelShape, teacher: ModelShape) -> None:
    check_site(site, student, teacher)
    check_equal("heads", student.head, teacher.head)
    check_vocabularies(student, teacher)


DISTANCES: dict[str, Distance] = {
    "embedding": Distance("embedding output", "hidden", _values, _equal_width, layered=False),
    "embedding_relation": Distance("the same, pair-wise scaled", "hidden", _relations, _any_width, layered=False),
    "attention": Distance("attention scores before the softmax", "attention_scores", _maps, _any_width),
    "attention_probs": Distance("attention probabilities", "attention_probs", _maps, _any_width),
    "attention_relation": Distance("attention probabilities, pair-wise scaled", "attention_probs", _map_relations, _any_width),
    "hidden": Distance("hidden states", "hidden", _values, _equal_width),
    "hidden_relation": Distance("the same, pair-wise scaled", "hidden", _relations, _any_width),
    "query": Distance("queries", "query", _values, _equal_width),
    "query_relation": Distance("the same, pair-wise scaled", "query", _relations, _any_width),
    "key": Distance("keys", "key", _values, _equal_width),
    "key_relation": Distance("the same, pair-wise scaled", "key", _relations, _any_width),
    "value": Distance("values", "value", _values, _equal_width),
    "value_relation": Distance("the same, pair-wise scaled", "value", _relations, _any_width),
    "soft": Distance("task logits, T^2 KL(teacher || student)", "task_logits", _soft, _task_heads, False, "row", None),
    "words": Distance("word logits of labelled tokens, likewise", "lm_logits", _words, _word_heads, False, "labels", None),
    "l_sp": Distance("GLMD's L_sp, likewise at all tokens", "lm_logits", _words, _word_heads, False, "all", (GLMD_TEMPERATURE,)),
}


def comparisons(
    names: Sequence[str] | None,
    layers: LayerMap,
    temperatures: Sequence[float],
    student: ModelShape,
    teacher: ModelShape,
    labelled: bool = True,
) -> tuple[Comparison, ...]:
    """The numbers of the distances ``names``; None: of all that the two models have.

    Args:
        labelled: Whether rows have labelled tokens.

    Raises:
        ValueError: an unknown name, a distance that the models do not have, or none at all; the message says which and why.
    """
    chosen = list(DISTANCES if names is None else dict.fromkeys(names))
    for name in chosen:
        if name not in DISTANCES:
            raise ValueError(f"unknown distance {name!r}{did_you_mean(name, sorted(DISTANCES))}")
    blocks = layer_pairs(layers, student, teacher) if any(DISTANCES[name].layered for name in chosen) else []
    found: list[Comparison] = []
    for name in chosen:
        try:
            found += _of(name, blocks, temperatures, student, teacher, labelled)
        except ValueError as error:
            if names is not None:
                raise ValueError(f"{name}: {error}") from None
    if not found:
        raise ValueError("the two models have nothing that can be compared")
    return tuple(found)


def _of(
    name: str,
    blocks: Sequence[tuple[int, int]],
    temperatures: Sequence[float],
    student: ModelShape,
    teacher: ModelShape,
    labelled: bool,
) -> list[Comparison]:
    distance = DISTANCES[name]
    distance.check(distance.site, student, teacher)
    if distance.positions == "labels" and not labelled:
        raise ValueError("the rows have no labelled tokens; l_sp compares the words of all tokens")
    if distance.layered:
        keys = [(pair, FeatureKey(distance.site, pair[0]), FeatureKey(distance.site, pair[1])) for pair in blocks]
        return [Comparison(name, student, teacher, s, t, pair) for pair, s, t in keys]
    if distance.site == "hidden":
        below = FeatureKey("hidden", 0)
        return [Comparison(name, student, teacher, below, below)]
    key = task_key(student) if distance.site == "task_logits" else FeatureKey(distance.site, positions=distance.positions)
    scores = key.site == "task_logits" and student.labels == 1 and student.head != "multiple_choice"
    at = [None] if scores else temperatures if distance.temperatures is None else distance.temperatures
    return [Comparison(name, student, teacher, key, key, None, temperature) for temperature in at]
