"""What a phase takes of a machine with student and teachers side by side, said before anything is loaded or run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from online.batch import bucket
from online.flops import peak_flops
from online.machines import UTILISATION, Dtype, Machine, parse_machine
from online.sharding import Sharding
from store.reader import Store
from store.remote import url_of
from student_train.live import Online
from student_train.outline import Folders, Outline, outline
from student_train.paper import Paper, Rows, check_rows, on_paper
from student_train.recipe import PhaseSpec, TrainRecipe
from student_train.ways import Choice, choices
from student_train.zero import Zero

Lies = tuple[Sharding | None, Zero | None]
"""How teachers and student lie over the ranks."""

SLOTS = 8
"""Slots of a store whose rows are looked at for their lengths."""


@dataclass(frozen=True)
class Wanted:
    """A machine, and what of its ranks."""

    machine: str
    ranks: tuple[int, ...] = ()
    """Of the job; every number that divides those of the machine by default."""
    length: int | None = None
    """Tokens of each row; as long as the stores' rows are by default."""
    nodes: int | None = None
    utilisation: float = UTILISATION
    known: Mapping[str, float] | None = None
    """As online.machines.parse_machine takes them."""


@dataclass(frozen=True)
class Plan:
    """A phase on a machine."""

    paper: Paper
    rows: Rows
    machine: Machine
    found: dict[int, list[Choice]]
    """Ranks of a job -> the ways that nothing refuses."""
    given: Lies | None
    """What the recipe says now; None where its teachers lie in several ways."""


def plan(recipe: TrainRecipe, phase: PhaseSpec, wanted: Wanted, folders: Folders | None = None) -> Plan:
    """Work out what ``phase`` takes in every way; configurations are read, and the numbers of stores that there are.

    Raises:
        ValueError, StoreError: a phase that `run` would refuse, a machine that cannot be read, or rows that are not here.
    """
    one = outline(recipe, _unsharded(phase), _known(phase, folders))
    paper = on_paper(one)
    rows = rows_of(one, wanted.length)
    check_rows(paper, rows)
    machines = _machines(paper, wanted)
    machine = machines[paper.computes]
    share = phase.batch_rows // phase.accumulation
    counts = wanted.ranks or tuple(count for count in range(1, machine.ranks + 1) if machine.ranks % count == 0)
    for count in wanted.ranks:
        if count > machine.ranks:
            raise ValueError(f"--ranks: {machine.name} has {machine.ranks}, found {count}")
    possible = [count for count in counts if share % count == 0 and phase.batch_rows % phase.accumulation == 0]
    if not possible:
        raise ValueError(
            f"phase {phase.name!r}: batch_rows {phase.batch_rows} with accumulation {phase.accumulation} cannot be shared out evenly over "
            f"{' or '.join(map(str, counts))} ranks"
        )
    return Plan(paper, rows, machine, {count: choices(paper, count, rows, machines) for count in possible}, _given(phase))


def rows_of(one: Outline, length: int | None) -> Rows:
    """The rows that a phase trains on: as its stores have them, or all of ``length`` tokens.

    Raises:
        ValueError: a store that is not there, and no length.
    """
    if length is not None:
        positions = {key.positions for _, method in one.methods for key in method.student_keys}
        return Rows(np.array([bucket(length)]), 1.0 if positions & {"masked", "labels"} else 0.0)
    lengths, labelled, tokens = [], 0, 0
    for data in one.phase.data:
        if url_of(data.store) is None and not data.store.exists():
            raise ValueError(f"phase {one.phase.name!r}: {data.store} is not there yet: say how long its rows are, as in --length 128")
        rows = Store.open(data.store).rows
        for slot in range(min(SLOTS, rows.info.slots)):
            lengths.append(rows.at(rows.rows_of(slot)).length)
        lengths.append(np.array([rows.longest]))
        labelled, tokens = labelled + int(rows.slot_labelled.sum()), tokens + int(rows.slot_tokens.sum())
    every = np.concatenate(lengths).astype(np.int64)
    return Rows(np.sort([bucket(int(length)) for length in every.tolist()]), labelled / max(1, tokens))


def _unsharded(phase: PhaseSpec) -> PhaseSpec:
    """``phase`` as one rank would run it: how it lies is what a plan is to say."""
    if not isinstance(phase.teacher, Online):
        return phase.model_copy(update={"zero": None})
    plain_ones = {name: spec.model_copy(update={"sharding": Sharding()}) for name, spec in phase.live.items()}
    teacher = phase.teacher.model_copy(update={"online": plain_ones.get("", plain_ones)})
    return phase.model_copy(update={"zero": None, "teacher": teacher})


def _known(phase: PhaseSpec, folders: Folders | None) -> Folders:
    """Folders of teachers for stores that are not there yet."""
    known = dict(folders or {})
    for spec in phase.live.values():
        known.setdefault("", spec.model)
    return known


def _given(phase: PhaseSpec) -> Lies | None:
    shardings: set[Sharding | None] = {spec.sharding for spec in phase.live.values()}
    shardings = shardings or {None}
    return (next(iter(shardings)), phase.zero) if len(shardings) == 1 else None


def _machines(paper: Paper, wanted: Wanted) -> dict[Dtype, Machine]:
    """The machine as fast as it is in each type that something computes in."""
    needed = {paper.computes, *(model.dtype for model in paper.teachers.values())}
    first = next((dtype for dtype in ("bfloat16", "float16", "float32") if dtype in needed), paper.computes)
    known = wanted.known or {}
    machine = parse_machine(wanted.machine, first, known, wanted.nodes, wanted.utilisation)
    machines: dict[Dtype, Machine] = {}
    for dtype in get_args(Dtype):
        flops = known.get("flops") or peak_flops(machine.like, dtype)
        if dtype in needed and flops is None:
            raise ValueError(f"{machine.like} does not compute in {dtype}; say its speed with --flops")
        machines[dtype] = replace(machine, flops=(flops or 0.0) * wanted.utilisation)
    return machines
