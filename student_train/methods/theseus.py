"""The student's blocks take the places of its teacher's, some in each step, until the teacher is gone.

Shapes: C classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar, Literal

from torch import Tensor

from online.batch import Batch, Features
from online.models import LoadedModel
from online.replacement import Replaced, check_pair
from store.shape import ModelShape
from student_train.methods.base import Method, Stages, Terms, check_equal
from student_train.methods.losses import vectors
from student_train.methods.task_loss import label_count, label_loss, task_key
from student_train.schedule import Schedule, Scheduled, check_range

CURRICULUM = Schedule(kind="linear", start=0.3, end=1.0, until=0.66)


class Theseus(Method):
    """CE(y, z) of a model whose module i is in each step, with probability r, the student's block i, and else the teacher's blocks for it.

    Xu, Zhou, Ge, Wei, Zhou, "BERT-of-Theseus: Compressing BERT by Progressive Module Replacing", EMNLP 2020, arXiv 2002.02925: the
    teacher (predecessor), fine-tuned for the task, is cut into as many modules of adjacent blocks as the student (successor) has blocks.
    A module is drawn once for a step, on all ranks and micro-batches alike, and one that is not chosen is not computed. Gradients pass
    through the teacher's frozen blocks to the student's below them. The student alone is measured and exported.

    ``rate`` is r: constant and then 1 is ``{kind: steps, values: [0.5, 1], at: [0.5]}``; the curriculum min(1, k t + b) is linear. By
    default it goes from 0.3 to 1 in the first 66 % of the phase, as GLMKD's code does (the authors' example: b 0.3, k 0.0006 a step).
    At 1 the phase is ordinary fine-tuning of the student: successor fine-tuning, the end of such a phase or one that follows.

    ``train: blocks``, as published, keeps embeddings and head as the student has them (start it from the teacher's: ``layers: first N``);
    ``all`` trains them too, as GLMKD does. A block that a step does not choose stays as it is: neither momentum nor weight decay move it.
    ``dropout``: as published, the teacher's blocks drop out as the student's do, the exception to teachers in eval mode; GLMKD has them
    in eval mode. The authors' scheduler counts a constant rate's end from step 0 when none is given, so that it is 1 at once; GLMKD's
    redrawing of steps that choose nothing has no effect. Here such a step teaches the embeddings at most.

    ``loss: none`` leaves the loss to the methods beside it, lm_loss for instance. A teacher split by tensor parallelism is refused, and
    so is a student under ZeRO-3, which would step unchosen blocks along old gradients.

    Term ``hard`` (rows, tokens or groups with a label).
    """

    paper = "Xu et al. 2020, EMNLP, arXiv 2002.02925"
    stages: ClassVar[Stages] = {"task": ("hard",)}
    kinds = frozenset({"changes what the student computes", "changes its loss as it goes", "trains in several phases"})
    accepts = "the teacher's family and width, fewer blocks"
    live = True

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        rate: Scheduled = CURRICULUM,
        train: Literal["blocks", "all"] = "blocks",
        dropout: bool = True,
        loss: Literal["task", "none"] = "task",
    ) -> None:
        check_range("rate", rate, least=0.0, most=1.0)
        for what in ("family", "width", "heads", "kv_heads", "head_width"):
            check_equal(what, getattr(student, what), getattr(teacher, what), "their blocks pass hidden states to each other")
        if student.layers > teacher.layers:
            raise ValueError(f"expected a student of at most the teacher's {teacher.layers} blocks, found {student.layers}")
        super().__init__({task_key(student)} if loss == "task" else (), reads_labels=loss == "task")
        self.shape, self.rate, self.train_only, self.dropout, self.loss = student, rate, train, dropout, loss
        ends = [number * teacher.layers // student.layers for number in range(student.layers + 1)]
        self.modules_of_teacher = {number: (ends[number - 1] + 1, ends[number]) for number in range(1, student.layers + 1)}
        """Student block -> first and last of the teacher's blocks that it takes the place of."""
        self._teachers: Mapping[str, LoadedModel] = {}

    def attach(self, teachers: Mapping[str, LoadedModel]) -> None:
        self._teachers = dict(teachers)
        assert self.running_student is not None
        check_pair(self.running_student, self.teacher)

    @property
    def teacher(self) -> LoadedModel:
        """The predecessor."""
        return self._teachers[""]

    def decided(self) -> Sequence[int]:
        return [int(chosen) for chosen in self.chosen()]

    def chosen(self) -> list[bool]:
        """Which of the student's blocks run in this step."""
        draws = self.moment.draws("theseus", self.moment.step).random(self.shape.layers)
        chosen: list[bool] = (draws < self.now(self.rate)).tolist()
        return chosen

    def running(self, student: LoadedModel, batch: Batch) -> AbstractContextManager[object]:
        return self._mixed(student, batch)

    @contextmanager
    def _mixed(self, student: LoadedModel, batch: Batch) -> Iterator[None]:
        left = {number: self.modules_of_teacher[number] for number, chosen in enumerate(self.chosen(), 1) if not chosen}
        predecessor = self.teacher
        predecessor.model.train(self.dropout)
        try:
            with Replaced(student, predecessor, left, batch):
                yield
        finally:
            predecessor.model.eval()

    def gates(self) -> Mapping[int, float]:
        rest = 1.0 if self.train_only == "all" else 0.0
        return {0: rest, **{number: float(chosen) for number, chosen in enumerate(self.chosen(), 1)}}

    def counts(self, batch: Batch) -> Terms:
        return {"hard": label_count(batch, self.shape)} if self.loss == "task" else {}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        return {"hard": self._hard(student, batch)} if self.loss == "task" else {}

    def _hard(self, student: Features, batch: Batch) -> Tensor:
        return label_loss(vectors(student, task_key(self.shape), batch), batch, self.shape)
