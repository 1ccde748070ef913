"""What a method is: keys it needs of both sides, and sums of loss terms with their counts."""

from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from online.batch import Batch, Features
from store.features import FeatureKey
from store.shape import ModelShape

Terms = dict[str, Tensor]
"""Name of a term -> 0-d float32."""

Weight = Annotated[float, Field(ge=0)]
"""Weight of one term of a method; 0 leaves the term, and the features only it reads, out."""
Temperature = Annotated[float, Field(gt=0)]
LayerMap = Literal["uniform", "last"] | list[tuple[int, int]]
"""Which teacher block each student block learns from: pairs (student, teacher) counted from 1 (0 is the embedding output
where a method reads it), ``uniform`` as TinyBERT (student l from l * N_t / N_s, Jiao et al. 2020) or ``last`` (N_s from N_t)."""


class Method(nn.Module):
    """One distillation loss: ``__init__(student, teacher, *, option=default, ...)`` with the recipe's option names.

    A subclass hands ``__init__`` the keys (no pass name) that it reads, chosen from the two shapes and its options
    alone; it never sees a model, and does not know where the teacher's features come from. Its parameters train beside
    the student and never reach the exported model. The trainer runs ``forward`` with autocast off: losses are float32.
    """

    needs_teacher: ClassVar[bool] = True
    """Whether it learns from a teacher; otherwise ``teacher`` may be None and the teacher's features empty."""

    def __init__(self, student_keys: Iterable[FeatureKey], teacher_keys: Iterable[FeatureKey] = (), *, reads_labels: bool = False) -> None:
        super().__init__()
        self.student_keys = frozenset(student_keys)
        self.teacher_keys = frozenset(teacher_keys)
        self.reads_labels = reads_labels
        """Whether a term learns from the task labels of rows or tokens."""

    def counts(self, batch: Batch) -> Terms:
        """Term -> how many tokens, rows or pairs of ``batch`` it sums over; known before any forward pass.

        The trainer divides each sum by its count over all ranks and accumulation steps.
        """
        raise NotImplementedError

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        """Term -> weighted sum over ``batch``, differentiable in the student's features; the same names as ``counts``."""
        raise NotImplementedError


def layer_pairs(layers: LayerMap, student: ModelShape, teacher: ModelShape, lowest: int = 1) -> list[tuple[int, int]]:
    """Pairs (student block, teacher block) that ``layers`` names; explicit pairs may start at ``lowest``.

    Raises:
        ValueError: no pair, or a block out of range; the message says how many there are.
    """
    if layers == "uniform":
        pairs = [(l, l * teacher.layers // student.layers) for l in range(1, student.layers + 1)]
    elif layers == "last":
        pairs = [(student.layers, teacher.layers)]
    else:
        pairs = list(layers)
    if not pairs:
        raise ValueError("layers: expected at least one pair [student block, teacher block], found none")
    for s, t in pairs:
        check_block("layers", "student", s, student, lowest)
        check_block("layers", "teacher", t, teacher, lowest)
    return pairs


def block_keys(sites: Sequence[str], blocks: Sequence[tuple[int, int]]) -> tuple[set[FeatureKey], set[FeatureKey]]:
    """The student's and the teacher's keys of ``sites`` in every pair of ``blocks``."""
    pairs = [(FeatureKey(site, s), FeatureKey(site, t)) for site in sites for s, t in blocks]
    return {s for s, _ in pairs}, {t for _, t in pairs}


def check_block(option: str, side: str, block: int, shape: ModelShape, lowest: int = 1) -> None:
    """Refuse a block that a model does not have."""
    if not lowest <= block <= shape.layers:
        raise ValueError(f"{option}: the {side} has blocks {lowest} to {shape.layers}, found {block}")


_HEADS = {
    "head_input": ("masked_lm", "causal_lm"),
    "lm_logits": ("masked_lm", "causal_lm"),
    "task_logits": ("classification", "token_classification", "multiple_choice"),
}
_ATTENTION = ("query", "key", "value", "attention_scores", "attention_probs")


def check_site(site: str, student: ModelShape, teacher: ModelShape | None) -> None:
    """Refuse a ``site`` that either model lacks: a logit without its head, attention of a model given by module paths."""
    for side, shape in (("student", student), ("teacher", teacher)):
        if shape is None:
            continue
        if site in _HEADS and shape.head not in _HEADS[site]:
            raise ValueError(f"{site} needs a {side} with a head of {', '.join(_HEADS[site])}; found head: {shape.head}")
        if site in _ATTENTION and not shape.attends:
            raise ValueError(f"{site} cannot be read from the {side}: its family is {shape.family}, which names no attention projections")


def check_equal(what: str, student: int | str, teacher: int | str, hint: str = "") -> None:
    """Refuse two models that differ in ``what`` a method compares one to one."""
    if student != teacher:
        raise ValueError(f"expected equal {what} of student and teacher, found {student} and {teacher}{f'; {hint}' if hint else ''}")


def check_weights(method: str, *weights: float) -> None:
    """Refuse a method whose terms are all switched off."""
    if not any(weights):
        raise ValueError(f"{method}: every weight is 0, so there is nothing to learn")
