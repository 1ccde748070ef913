"""What a method is: keys it needs of both sides, and sums of loss terms with their counts."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field
from torch import Tensor, nn

from online.batch import Batch, Features
from online.models import LoadedModel
from store.features import FeatureKey
from store.intervention import Intervention
from store.shape import ModelShape
from student_train.moment import START, Moment
from student_train.schedule import NUMBER, SCHEDULE, Schedule, Scheduled, at, check_range, kind_of
from student_train.step import Step, Survey

Terms = dict[str, Tensor]
"""Name of a term -> 0-d float32."""

Weight = Annotated[float, Field(ge=0)]
"""Weight of one term of a method; 0 leaves the term, and the features only it reads, out."""


def _always_positive(schedule: Schedule) -> Schedule:
    check_range("temperature", schedule, above=0)
    return schedule


Temperature = Annotated[
    Annotated[float, Field(gt=0), NUMBER] | Annotated[Schedule, AfterValidator(_always_positive), SCHEDULE], Discriminator(kind_of)
]
"""T of a softmax, or how it changes."""
SAME_AS_INIT = "same_as_init"
"""As ``layers`` of a method in a recipe: each student block learns from the teacher block that it started from."""

LayerMap = Literal["uniform", "last"] | list[tuple[int, int]]
"""Which teacher block each student block learns from: pairs (student, teacher) counted from 1 (0 is the embedding output
where a method reads it), ``uniform`` as TinyBERT (student l from l * N_t / N_s, Jiao et al. 2020) or ``last`` (N_s from N_t)."""


TeacherShapes = Mapping[str, ModelShape]
"""Name of a teacher in the recipe's data -> its shape, in the recipe's order."""

Knowledge = Literal["embedding", "attention", "hidden", "soft", "hard"]
"""What a method learns from: GLMD's columns (Tan et al. 2023, arXiv 2306.06625, table 6)."""

Kind = Literal[
    "reads intermediate features",
    "reads other features as it goes",
    "changes what the student computes",
    "has parameters of its own",
    "changes its loss as it goes",
    "compares rows of a batch",
    "learns from several teachers",
    "trains in several phases",
]
"""In what a method differs from a loss on logits: ours, after what GKD's code lets a method override (Tan et al. 2023, arXiv 2306.06629);
whether they are the paper's own eight is unverified."""


Stages = Mapping[str, tuple[Knowledge, ...]]
"""Stage of a paper -> what a student learns from there."""


class Method(nn.Module):
    """One distillation loss: ``__init__(student, teacher, *, option=default, ...)`` with the recipe's option names.

    A subclass hands ``__init__`` the keys (no pass name) that it reads, chosen from the two shapes and its options
    alone; unless it is ``live`` it never sees a teacher's model, and it never knows where features come from. Its parameters train beside
    the student and never reach the exported model. The trainer runs ``forward`` with autocast off: losses are float32.

    What changes as training goes follows from ``self.moment`` (``schedule.at``, ``moment.draws``), or from buffers: a
    checkpoint holds them. Both are the same on all ranks. What compares the rows of a batch gathers them first (student_train.gather).
    """

    paper: ClassVar[str] = ""
    """Authors, year, arXiv number or place."""
    stages: ClassVar[Stages] = {}
    kinds: ClassVar[frozenset[Kind]] = frozenset()
    accepts: ClassVar[str] = "any"
    """Which students it takes, for people: ``as many heads, any width``."""
    needs_teacher: ClassVar[bool] = True
    """Whether it learns from a teacher; otherwise ``teacher`` may be None and the teacher's features empty."""
    several: ClassVar[bool] = False
    """Whether ``__init__`` takes the ``TeacherShapes`` of the phase; the pass name of a teacher's key is then that teacher's name."""
    least_rows: int = 1
    """Rows that a micro-batch must have over all ranks."""
    watches: ClassVar[bool] = False
    """Whether ``learned`` wants to be told."""
    perturbs: bool = False
    """Whether the step is to be taken at embeddings moved by one unit vector along their gradient (LRC-BERT)."""
    reads_meta: bool = False
    """Whether ``prepare`` looks at the labels of held-out rows, the phase's ``meta`` data."""
    live: ClassVar[bool] = False
    """Whether it works with the teachers' models themselves, which ``attach`` hands it, and so only where they run in the job (online)."""
    look_back: int = 0
    """Every how many optimiser steps ``prepare`` gets the micro-batches of as many steps before (``Step.past``); 0: never."""
    rewrites: bool = False
    """Whether ``rewrite`` changes the rows themselves, which a live teacher alone can then answer for; ``attach`` hands it that one."""
    takes_gradients: ClassVar[bool] = False
    """Whether it takes gradients in the student's weights by itself, or runs it with other weights: all of them must be there at once."""
    trains_teacher: ClassVar[bool] = False
    """Whether it changes its teacher's weights, and so takes no teacher in parts."""
    must_carry: bool = False
    """Whether its parameters mean nothing before an earlier phase has trained them: a recipe then names that phase with ``carry``."""
    learned_buffers: ClassVar[tuple[str, ...]] = ()
    """Buffers that it learns by rules of its own: kept for later phases, and carried on, as parameters are."""

    def __init__(self, student_keys: Iterable[FeatureKey], teacher_keys: Iterable[FeatureKey] = (), *, reads_labels: bool = False) -> None:
        super().__init__()
        self.student_keys = frozenset(student_keys)
        self.teacher_keys = frozenset(teacher_keys)
        self.reads_labels = reads_labels
        """Whether a term learns from the task labels of rows or tokens."""
        self.reads_phrases = False
        """Whether a term needs rows with phrases."""
        self.reads_domains = False
        """Whether a term needs rows with domains."""
        self.reads_clozes = False
        """Whether a term needs rows that are clozes, and so their classes' words."""
        self.interventions: Mapping[str, Intervention] = {}
        """Teacher -> what is written into it while it answers; nothing is into others."""
        self.domains: int | None = None
        """How many there are, where something is kept of each."""
        self.moment: Moment = START
        """The optimiser step that its next calls belong to."""
        self.running_student: LoadedModel | None = None
        """The student, for passes that the method makes by itself (student_train.step.run); no submodule."""

    def now(self, value: Scheduled) -> float:
        """An option at this step."""
        return at(value, self.moment)

    def counts(self, batch: Batch) -> Terms:
        """Term -> how many tokens, rows or pairs of ``batch`` it sums over; known before any forward pass.

        The trainer divides each sum by its count over all ranks and accumulation steps.
        """
        raise NotImplementedError

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        """Term -> weighted sum over ``batch``, differentiable in the student's features; the same names as ``counts``."""
        raise NotImplementedError

    def survey(self, rows: Survey) -> None:
        """Told once, before the first step, which rows it will learn from."""

    def prepare(self, step: Step) -> None:
        """Called before ``forward`` of each micro-batch that is trained on, for passes of the student that the method makes by itself."""

    def attach(self, teachers: Mapping[str, LoadedModel]) -> None:
        """Told once, before the first step and only where ``live`` or ``rewrites``: its teachers' models by name, frozen, in eval mode.

        They must not become submodules: what is registered in a method trains with it and lies in its checkpoints.
        """

    def rewrite(self, batch: Batch, student: LoadedModel) -> Batch:
        """The rows to learn from in place of ``batch``, before anything is counted or any teacher answers; without gradient."""
        return batch

    def running(self, student: LoadedModel, batch: Batch) -> AbstractContextManager[object]:
        """Around the student's forward pass on a micro-batch that is trained on; modules replaced for instance."""
        return nullcontext()

    def decided(self) -> Sequence[int]:
        """What it drew for this step: all ranks must have drawn the same, and the trainer compares."""
        return ()

    def learned(self, means: Mapping[str, float]) -> None:
        """Told after each optimiser step, on all ranks alike, the means of its terms (where there was anything to learn from)."""

    def gates(self) -> Mapping[int, float] | None:
        """Factors on the learning rate in this step: student block -> factor, 0 for all else of the student; None leaves it alone.

        A factor of 0 keeps weights and their optimiser state as they are.
        """
        return None


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


def row_token(student: ModelShape) -> str:
    """Positions of the token that stands for its row: the first one, or the last in causal students, whose first has seen nothing."""
    return "last" if student.causal else "first"


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


PADDING = 20
"""Models of one tokenizer may be padded to vocabularies that differ by one word in so many (151,936 and 152,064 words: one in 1,188)."""


def check_vocabularies(student: ModelShape, teacher: ModelShape) -> None:
    """Refuse vocabularies that are not one tokenizer's, padded differently or not. Whether tokenizers agree is checked with the rows."""
    if abs(student.vocab - teacher.vocab) * PADDING > max(student.vocab, teacher.vocab):
        check_equal("vocabularies", student.vocab, teacher.vocab, "models of one tokenizer differ by no more than padding")


def check_weights(method: str, *weights: float) -> None:
    """Refuse a method whose terms are all switched off."""
    if not any(weights):
        raise ValueError(f"{method}: every weight is 0, so there is nothing to learn")
