"""A whole recipe: its phases in sequence, each in a process of its own, each ending in an exported student."""

import logging
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed

from online.models import LoadedModel, check_length
from online.teacher import Teacher, Teachers
from store.errors import MissingFeature
from store.features import FeatureKey
from store.manifest import Provenance
from store.provenance import provenance
from store.reader import Store
from store.together import PassName
from student_train.adapters import merge
from student_train.arguments import training_arguments
from student_train.bundle import Bundle
from student_train.carry import carry, check_carried, dropped, keep
from student_train.child import run_child
from student_train.cost import cost
from student_train.data import Source, survey
from student_train.evaluate import HeldOut, answered, evaluate, held_out_rows
from student_train.export import Lineage, export
from student_train.init import build, check_start
from student_train.live import answering, load_live, takes_all_ranks
from student_train.methods.base import Method
from student_train.moment import START
from student_train.origins import data_lines, teacher_lines
from student_train.outline import Keys, Outline, outline, score_names
from student_train.output import (
    ADAPTER,
    CHECKPOINTS,
    finished,
    locked,
    phase_folder,
    read_start,
    recipe_yaml,
    refuse_foreign,
    student_folder,
    write_result,
    write_run,
    write_start,
)
from student_train.predictions import write_predictions
from student_train.probe import Probe
from student_train.recipe import DataSpec, MethodSpec, PhaseSpec, TrainRecipe
from student_train.teacher import StoredTeacher
from student_train.train import micro_batches, train
from student_train.unsafe import check_zero
from student_train.vocabulary import check_verbalisers

Models = Mapping[str, LoadedModel]
"""Teachers that run in this job, by name."""

SMOKE_STEPS = 3
SMOKE_ROWS = 32
_log = logging.getLogger(__name__)


class PhaseError(Exception):
    """A phase's process ended badly, after it said why; ``code`` is its exit code."""

    def __init__(self, phase: str, code: int) -> None:
        super().__init__(f"phase {phase!r} ended with exit code {code}")
        self.code = code


def run(recipe: TrainRecipe, command: Sequence[str], only: str | None = None) -> None:
    """Train the phases of ``recipe`` (or ``only`` one of them) that are not finished yet.

    All of them are checked first, down to the features that they will read. Where several are left, each runs in a
    fresh process: what one leaves behind in libraries must not reach the next.

    Raises:
        ValueError, StoreError: the recipe, a store or the output folder does not fit; nothing was written.
        PhaseError: the process of a phase ended badly.
    """
    phases = recipe.phases if only is None else (recipe.phase(only),)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and len(phases) > 1:
        names = ", ".join(phase.name for phase in phases)
        raise ValueError(f"a launch of several processes trains one phase: add --phase with one of {names}")
    if _first():  # which is about to write there
        refuse_foreign(recipe.output)
    outlines = check(recipe, phases)
    left = [one for one in outlines if not finished(recipe, one.phase)]
    for one in outlines:
        if one not in left:
            _log.info("phase %r is finished: %s", one.phase.name, student_folder(recipe, one.phase.name))
    if not left:
        return
    made = provenance(command)
    if _first():
        write_run(recipe, made)
    if len(left) == 1:
        train_phase(recipe, left[0], made)
        return
    with tempfile.TemporaryDirectory(prefix="student-train-") as folder:
        resolved = Path(folder) / "recipe.yaml"
        resolved.write_text(recipe_yaml(recipe), encoding="utf-8")
        for one in left:
            _in_child(resolved, one.phase.name)


def smoke(recipe: TrainRecipe, command: Sequence[str]) -> None:
    """Three optimiser steps of every phase at its own batch size, measured on few rows, into a folder that is then removed."""
    with tempfile.TemporaryDirectory(prefix="student-train-smoke-") as folder:
        run(smoke_recipe(recipe, Path(folder) / "output"), command)


def smoke_recipe(recipe: TrainRecipe, output: Path) -> TrainRecipe:
    """``recipe`` with all phases cut short."""

    def short(phase: PhaseSpec) -> PhaseSpec:
        kept = {name: value for name, value in phase.trainer.items() if not name.startswith(("save_", "eval_", "logging_"))}
        trainer = {**kept, "save_strategy": "no", "logging_steps": 1, **({"eval_steps": SMOKE_STEPS} if phase.evaluate else {})}
        rows = min(phase.evaluate_rows or SMOKE_ROWS, SMOKE_ROWS)
        return phase.model_copy(update={"steps": SMOKE_STEPS, "epochs": None, "patience": None, "evaluate_rows": rows, "trainer": trainer})

    return recipe.model_copy(update={"phases": tuple(map(short, recipe.phases)), "output": output})


def check(recipe: TrainRecipe, phases: Sequence[PhaseSpec]) -> list[Outline]:
    """Work out ``phases`` and refuse what would only fail later; all that a pass lacks is said in one message.

    Raises:
        ValueError, StoreError: what does not fit; nothing was written.
    """
    outlines = check_options(recipe, phases)
    check_features(outlines)
    return outlines


def check_options(recipe: TrainRecipe, phases: Sequence[PhaseSpec]) -> list[Outline]:
    """What ``check`` does, but for the features of the passes."""
    outlines = [outline(recipe, phase) for phase in phases]
    for one in outlines:
        phase = one.phase
        check_start(one.blueprint)
        check_zero(phase, one.methods)
        meta = None if phase.meta is None else Source.of(phase.meta, Store.open(phase.meta.store), None)
        micro_batches([Source.of(data, Store.open(data.store), None) for data in phase.data], phase, recipe.seed, meta)
        for earlier in sorted({spec.carry for spec in phase.methods if spec.carry is not None}):
            check_carried(one, outline(recipe, recipe.phase(earlier)))
        for data in phase.evaluate:
            if data.where is not None:
                held_out_rows(Store.open(data.store), data.split, phase.evaluate_rows, data.where, data.compared_pass)
        if "RANK" not in os.environ:  # making arguments joins the ranks of a launch, which happens once: in train
            _check_arguments(recipe, phase)
    return outlines


def check_features(outlines: Sequence[Outline]) -> None:
    """Raise MissingFeature, with one paragraph for each pass, where stores lack what phases read; the phases may be of several recipes."""
    wanted: dict[tuple[Path, PassName], frozenset[FeatureKey]] = {}
    for one in outlines:
        for place, keys in one.passes.items():
            wanted[place] = wanted.get(place, frozenset()) | keys
    followed = {data.store for one in outlines for data in one.phase.data if data.follow}
    problems = [
        problem for (path, pass_name), keys in wanted.items() if (problem := _lack(Store.open(path), pass_name, keys, path in followed))
    ]
    if problems:
        raise MissingFeature("\n\n".join(problems))


def train_phase(recipe: TrainRecipe, one: Outline, made: Provenance) -> None:
    """Train one phase in this process (with those of the other ranks under torchrun) and export its student."""
    phase, folder = one.phase, phase_folder(recipe, one.phase.name)
    for earlier in dict.fromkeys([phase.student.phase, *(spec.carry for spec in phase.methods)]):
        if earlier is not None and not finished(recipe, recipe.phase(earlier)):
            raise ValueError(f"phase {phase.name!r} goes on from phase {earlier!r}, which is not finished: train that first")
    with locked(folder) if _first() else nullcontext():
        if phase.live and "RANK" in os.environ:
            _check_arguments(recipe, phase)  # which joins the ranks: a sharded teacher is loaded by all of them
        start = build(one.blueprint, recipe.seed)
        if _first():
            for notice in start.notices:
                _log.warning("phase %r: %s", phase.name, notice)
            shape = one.blueprint.shape
            _log.info(
                "phase %r: a student of %d blocks of width %d starts as %s", phase.name, shape.layers, shape.width, start.fingerprint[:16]
            )
        bundle = Bundle(start.student, _methods(one, recipe.seed))
        carried = carry(bundle, recipe)
        patience = {data.store: data.follow for data in (*phase.read[len(phase.data) :], *phase.data)}
        stores = {place: Store.open(place, follow=seconds or 0.0) for place, seconds in patience.items()}
        for store in stores.values():
            check_length(start.student, store.rows.longest)
            check_verbalisers(start.student, store)
        device = _device(phase)
        live = load_live(phase.live, max(store.rows.longest for store in stores.values()), device)
        sources = [_source(one, data, stores[data.store], live) for data in phase.data]
        meta = None if phase.meta is None else _source(one, phase.meta, stores[phase.meta.store], live)
        bundle.begin(replace(START, seed=recipe.seed))
        bundle.attach(live)
        bundle.survey(lambda: survey(sources))
        held_out = [_held_out(one, data, stores[data.store], live) for data in phase.evaluate]
        probe = _probe(one, stores, live)
        bundle.to(device)

        def measure() -> dict[str, float]:
            return evaluate(bundle, phase.metrics, held_out)

        together, before = takes_all_ranks(live), {}
        if _first() or together:
            before = read_start(recipe, phase) or measure()
        if _first():
            write_start(recipe, phase, before)
        started = time.perf_counter()
        try:
            result = train(bundle, sources, phase, folder, recipe.seed, measure if phase.evaluate else None, meta, probe, together=together)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"phase {phase.name!r}: {error}; give a smaller batch_rows or more accumulation and start again") from None
        took = cost(time.perf_counter() - started, sources)
        after, answers = answered(bundle, phase.metrics, held_out) if _first() or together else ({}, [])
        taught_by = teacher_lines(one, stores, live)
        if _first():
            left = [f"{name}: its parameters do not reach this folder" for name in dropped(bundle)]
            notices = (*start.notices, *(f"{name} went on from phase {earlier}" for name, earlier in carried.items()), *left)
            lineage = Lineage(phase, recipe.seed, taught_by, data_lines(phase, stores), notices, made, recipe.card)
            if phase.student.lora is not None:
                merge(start.student, phase.student.lora, folder / ADAPTER)
            export(start.student, lineage, before, after, student_folder(recipe, phase.name))
            write_predictions(folder, held_out, answers)
            write_result(
                recipe,
                phase,
                {
                    "start": start.fingerprint,
                    "student": start.student.fingerprint,
                    "methods": keep(bundle, folder),
                    "carried": dict(carried),
                    "dropped": list(dropped(bundle)),
                    "notices": list(start.notices),
                    "before": dict(before),
                    "after": dict(after),
                    "steps": result.steps,
                    "best_step": result.best_step,
                    "cost": took.model_dump(),
                    "phase": phase.model_dump(mode="json"),
                    "made": made.model_dump(mode="json"),
                },
            )
            _log.info("phase %r is finished: %s", phase.name, student_folder(recipe, phase.name))
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _check_arguments(recipe: TrainRecipe, phase: PhaseSpec) -> None:
    training_arguments(
        phase.trainer,
        f"phase {phase.name!r}",
        phase_folder(recipe, phase.name) / CHECKPOINTS,
        seed=recipe.seed,
        accumulation=phase.accumulation,
        workers=phase.workers,
        steps=phase.steps or 1,
        epoch_steps=1,
        evaluates=bool(phase.evaluate),
    )


def _lack(store: Store, pass_name: PassName, keys: frozenset[FeatureKey], followed: bool) -> str:
    """What a pass lacks of ``keys``, and how to mend it; empty where all is there, or will be."""
    try:
        teacher = StoredTeacher(store, pass_name, keys)
    except MissingFeature as error:
        return str(error)
    unfinished = next((name for name in teacher.passes if not store.complete(name)), None)
    if followed or unfinished is None:
        return ""
    done, slots = len(store.committed(unfinished)), store.manifest.rows.slots
    return (
        f"pass {unfinished} of {store.where} is unfinished ({done} of {slots} shards): start its dump again to go on, "
        "or give the data 'follow: SECONDS' to wait for the rest while it is dumped"
    )


def _methods(one: Outline, seed: int) -> list[tuple[MethodSpec, Method]]:
    """The phase's methods; the weights of their projections follow from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [(spec, one.parse(spec)) for spec, _ in one.methods]


def _source(one: Outline, data: DataSpec, store: Store, live: Models) -> Source:
    return Source.of(data, store, _teacher(one, store, data, one.method_keys, live) if data in one.taught else None)


def _teacher(one: Outline, store: Store, data: DataSpec, keys: Mapping[str, Keys], live: Models) -> Teacher | Teachers:
    """Whoever answers for ``keys`` (by teacher) on the rows of ``data``."""
    if live:
        return answering(live, keys, one.phase.live)
    teachers = {name: StoredTeacher(store, passes, keys.get(name, frozenset())) for name, passes in data.answers.items()}
    return teachers[""] if "" in teachers else Teachers(teachers)


def _held_out(one: Outline, data: DataSpec, store: Store, live: Models) -> HeldOut:
    rows = held_out_rows(store, data.split, one.phase.evaluate_rows, data.where, data.compared_pass)
    compared = one.phase.compared(data)
    keys = {name: wanted for name, passes in data.answers.items() if (wanted := one.passes.get((data.store, passes)))}
    if live:
        keys = {name: one.method_keys[name] | (one.measured if name == compared else frozenset()) for name in live}
    teacher = _teacher(one, store, data, keys, live) if any(keys.values()) else None
    return HeldOut(store, rows, teacher, data in one.taught, score_names(one.phase)[data], compared)


def _probe(one: Outline, stores: Mapping[Path, Store], live: Models) -> Probe | None:
    if one.probe is None:
        return None
    data, compared = one.probe.data, one.phase.compared(one.probe.data)
    rows = held_out_rows(stores[data.store], data.split, one.probe.rows, data.where, data.compared_pass)
    teacher = _teacher(one, stores[data.store], data, {compared: one.probe.teacher_keys}, live)
    return Probe(one.probe, HeldOut(stores[data.store], rows, teacher, False, "", compared))


def _device(phase: PhaseSpec) -> torch.device:
    """Where this process trains."""
    if torch.cuda.is_available() and not phase.trainer.get("use_cpu"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _in_child(recipe: Path, phase: str) -> None:
    """Train a phase in a fresh process that ends when this one is told to."""
    code = run_child([sys.executable, "-m", "student_train.cli", "phase", str(recipe), phase])
    if code:
        raise PhaseError(phase, code)
