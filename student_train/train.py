"""One phase of training: from a bundle and its sources to trained weights, going on from where an earlier process stopped."""

import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import ProgressCallback, TrainerState, set_seed

from online.kept_words import kept_words
from online.ranks import Ranks
from store import order
from store.manifest import Json
from store.publish import crc32c
from store.together import PassName, fingerprint
from student_train import checkpoint, lending
from student_train.agreement import check_same_run
from student_train.arguments import checkpoints_student, fixed_on_resume, training_arguments
from student_train.bundle import Bundle
from student_train.curves import JOURNAL, write_curves
from student_train.data import MicroBatches, Source
from student_train.journal import Journal
from student_train.lost import ending_together
from student_train.moment import Moment
from student_train.output import CHECKPOINTS
from student_train.patience import out_of_patience
from student_train.probe import Probe, Probing
from student_train.probe_table import PROBE_JOURNAL, write_probe
from student_train.progress import Progress
from student_train.recipe import PhaseSpec
from student_train.reporters import reporters
from student_train.trainer import TRAINER_STATE, DistillationTrainer
from student_train.zero import check_launch

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a run did. The weights are in the bundle it was given."""

    steps: int
    """Optimiser steps taken, those before a resumption included."""
    resumed: int | None
    """Step of the checkpoint that this process went on from."""
    best_step: int | None
    """Step whose weights the student now has, where a metric picks them; None: those of the last step."""
    best_metric: float | None
    history: list[dict[str, float]]
    """The logs of all steps, as in metrics.jsonl; evaluations have keys that start with ``eval_``."""


def train(
    bundle: Bundle,
    sources: Sequence[Source],
    phase: PhaseSpec,
    output: Path,
    seed: int,
    evaluate: Callable[[], dict[str, float]] | None = None,
    meta: Source | None = None,
    probe: Probe | None = None,
    *,
    together: bool = False,
) -> TrainResult:
    """Train ``bundle`` in place on rows of ``sources`` (those of ``phase.data``, in order) and leave it in eval mode.

    Checkpoints go to ``output/checkpoints``, curves to ``output/metrics.jsonl`` (and, when training ends, ``metrics.parquet``) and
    ``output/tensorboard``. Where ``output`` holds a whole checkpoint of this run, training goes on from it with the same losses.
    ``evaluate`` is called on rank 0, with the bundle in eval mode; on all ranks where ``together``, or where the student lies in
    parts. ``phase.best`` names one of the metrics it returns. What ``probe`` sees goes to ``output/probe.jsonl`` and, when training ends,
    ``probe.parquet``.

    Raises:
        ValueError: a trainer argument, batch size or metric that does not fit, a checkpoint of other settings, or a loss
            that is not finite.
    """
    where, checkpoints = f"phase {phase.name!r}", output / CHECKPOINTS
    if phase.zero is not None:
        check_launch(where)
    data = micro_batches(sources, phase, seed, meta)
    args = training_arguments(
        phase.trainer,
        where,
        checkpoints,
        seed=seed,
        accumulation=phase.accumulation,
        workers=phase.workers,
        steps=data.steps,
        epoch_steps=data.epoch_steps,
        evaluates=evaluate is not None,
        every_backward=phase.zero is not None,
    )
    ranks = Ranks(args.ddp_timeout)
    words = kept_words(bundle.student)
    settings = _settings(phase, data, seed, ranks.count) | ({} if words is None else {"kept words": {"fingerprint": words.fingerprint}})
    check_same_run(ranks, settings)
    resumed = ranks.on_first(lambda: checkpoint.newest(checkpoints, settings))
    step = 0 if resumed is None else checkpoint.step_of(resumed)
    callbacks = reporters(args, where, output, step, ranks.number == 0)
    if checkpoints_student(phase.trainer):
        bundle.checkpoint_activations(where)
    trainer = DistillationTrainer(
        bundle,
        args,
        data,
        ranks,
        settings=settings,
        evaluate=evaluate,
        together=together or (phase.zero is not None and phase.zero.stage == 3),
        best=phase.best,
        patience=phase.patience,
        gradient_norms=phase.gradient_norms,
        zero=phase.zero,
        callbacks=callbacks,
    )
    bundle.begin(Moment(step, data.steps, data.epoch_steps, seed))
    progress = Progress()
    if trainer.pop_callback(ProgressCallback):  # absent under disable_tqdm
        trainer.add_callback(progress)
    kept = -1 if resumed is None else step
    if ranks.number == 0:
        trainer.journal = Journal(output / JOURNAL, kept)
    if probe is not None:
        trainer.add_callback(Probing(trainer, probe, Journal(output / PROBE_JOURNAL, kept) if ranks.number == 0 else None))
    set_seed(seed + ranks.number)  # every rank its own dropout
    try:
        with ending_together(ranks.count):
            _run(trainer, resumed)
            if trainer.engine is not None:
                trainer.engine.end()
            trainer.use_best_weights()
    finally:
        if ranks.number == 0:
            write_curves(output)
            if probe is not None:
                write_probe(output)
        progress.close()
        lending.forget()
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    bundle.eval()
    state = trainer.state
    return TrainResult(state.global_step, None if resumed is None else step, state.best_global_step, state.best_metric, state.log_history)


def micro_batches(sources: Sequence[Source], phase: PhaseSpec, seed: int, meta: Source | None = None) -> MicroBatches:
    """What this rank reads of ``sources`` in the course of ``phase``; raises ValueError for ``batch_rows`` that cannot be shared out."""
    try:
        return MicroBatches(
            sources,
            meta=meta,
            batch_rows=phase.batch_rows,
            accumulation=phase.accumulation,
            steps=phase.steps,
            epochs=phase.epochs,
            seed=seed,
            rank=int(os.environ.get("RANK", 0)),
            world=int(os.environ.get("WORLD_SIZE", 1)),
        )
    except ValueError as error:
        raise ValueError(f"phase {phase.name!r}: {error}") from None


def _run(trainer: DistillationTrainer, resumed: Path | None) -> None:
    """The loop; a run that had stopped for want of a better metric has nothing left to do."""
    if resumed is not None:
        _log.info("going on from %s", resumed)
        state = TrainerState.load_from_json(str(resumed / TRAINER_STATE))
        if out_of_patience(state, trainer.patience):
            trainer._load_from_checkpoint(str(resumed))
            trainer.state = state
            return
    with warnings.catch_warnings():
        # its replacement would copy rank 0's buffers over those of the others when a run starts
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))


def _settings(phase: PhaseSpec, data: MicroBatches, seed: int, ranks: int) -> dict[str, Json]:
    """What a resumed run must have in common with the run that made its checkpoint, or its losses would differ."""
    settings = {
        "ranks": ranks,
        "zero": None if phase.zero is None else phase.zero.model_dump(mode="json"),
        "seed": seed,
        "steps": data.steps,
        "batch_rows": phase.batch_rows,
        "accumulation": phase.accumulation,
        "data": [
            _identity(source, ordered, spec.answers)
            for source, ordered, spec in zip(data.sources, data.order.sources, phase.data, strict=True)
        ],
        "meta": _meta(phase, data),
        "methods": [method.model_dump(mode="json") for method in phase.methods],
        "trainer": fixed_on_resume(phase.trainer),
    }
    plain: dict[str, Json] = json.loads(json.dumps(settings))
    return plain


def _meta(phase: PhaseSpec, data: MicroBatches) -> dict[str, object] | None:
    if phase.meta is None or data.meta is None or data.meta_order is None:
        return None
    return _identity(data.meta, data.meta_order.sources[0], phase.meta.answers)


def _identity(source: Source, ordered: order.Source, answers: Mapping[str, PassName]) -> dict[str, object]:
    """What a source says and in which order, wherever its store lies."""
    manifest = source.store.manifest
    of_teacher = source.teacher is not None or source.where is not None
    return {
        "corpus": manifest.rows.corpus,
        "building": manifest.rows.building,
        "split": source.split,
        "weight": source.weight,
        "teacher": {name: fingerprint(manifest.passes, passes) for name, passes in answers.items()} if of_teacher else None,
        "where": None if source.where is None else source.where.model_dump(mode="json", exclude_defaults=True),
        "order": {"shuffle": source.shuffle, "window": source.window, "by_length": source.by_length},
        "units": [crc32c(pool.counts.tobytes()) for pool in ordered.copies],
    }
