"""Look at the distance of student and teacher as a phase trains; the student that comes out is the same to the bit as without."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from student_train.bundle import Bundle
from student_train.distances import Comparison
from student_train.evaluate import HeldOut, looks
from student_train.journal import Journal
from student_train.probe_plan import ProbePlan
from student_train.random_state import random_state_kept

if TYPE_CHECKING:
    from student_train.trainer import DistillationTrainer


@dataclass(frozen=True)
class Probe:
    """A plan, with the rows and the teacher that answers for them."""

    plan: ProbePlan
    data: HeldOut


def measured(bundle: Bundle, data: HeldOut, compared: Sequence[Comparison]) -> dict[str, float]:
    """Name of each of ``compared`` -> its mean over the rows, in eval mode, without gradient; left out where there is nothing to compare.

    The student is left in the mode it was in.
    """
    keys = frozenset(one.student_key for one in compared)
    sums, counts = dict.fromkeys((one.name for one in compared), 0.0), dict.fromkeys((one.name for one in compared), 0.0)
    training = bundle.training
    bundle.eval()
    try:
        with torch.no_grad():
            for batch, student, answers in looks(bundle, keys, data):
                teacher = {key.of(""): value for key, value in answers.items() if key.pass_name == data.compared}
                for one in compared:
                    total, count = one.part(student, teacher, batch)
                    sums[one.name] += float(total)
                    counts[one.name] += float(count)
    finally:
        bundle.train(training)
    return {name: total / counts[name] for name, total in sums.items() if counts[name]}


class Probing(TrainerCallback):
    """Measures before the first step, at every evaluation, every so many steps and after the last one.

    Steps that it measures are logged too, so that each distance has the training loss of its step. What a checkpoint was written after is
    in the ``journal`` by then: a run that goes on from it neither repeats nor lacks a step.

    Args:
        journal: Of rank 0; None on others, which come along where the student's or the teacher's forward pass is a collective.
    """

    def __init__(self, trainer: "DistillationTrainer", probe: Probe, journal: Journal | None) -> None:
        self._trainer, self._probe, self._journal = trainer, probe, journal

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_unused: object) -> None:
        if state.global_step == 0:
            self._look(0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_unused: object) -> None:
        """Comes after transformers' own callback, which says whether this step is evaluated, and before anything is written."""
        every = self._probe.plan.every
        if control.should_evaluate or state.global_step == state.max_steps or (every is not None and state.global_step % every == 0):
            self._look(state.global_step)
            control.should_log = True

    def _look(self, step: int) -> None:
        """All ranks come here, or none."""
        started, trainer = time.perf_counter(), self._trainer
        with random_state_kept():
            found = self._measure() if trainer.together else None
            values = trainer.ranks.on_first(self._measure if found is None else lambda: found)
        if self._journal is not None:
            self._journal.append({"step": step, **values})
        trainer.window.paused += time.perf_counter() - started

    def _measure(self) -> dict[str, float]:
        return measured(self._trainer.bundle, self._probe.data, self._probe.plan.comparisons)
