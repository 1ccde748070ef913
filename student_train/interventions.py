"""Whether teachers answered with what was written into them that their methods expect, and with nothing else."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from store.intervention import Intervention
from store.manifest import Manifest
from store.together import names
from student_train.methods.base import Method
from student_train.recipe import DataSpec, MethodSpec, PhaseSpec


class Answered(NamedTuple):
    """How a teacher answers."""

    intervention: Intervention | None
    weights: str
    """What tells the weights from others."""


def check_interventions(
    phase: PhaseSpec,
    methods: Sequence[tuple[MethodSpec, Method]],
    taught: Collection[DataSpec],
    manifests: Mapping[Path, Manifest | None],
    measured: bool,
) -> None:
    """Refuse a method that reads a teacher with another intervention than it expects, and metrics or a probe on one that has any.

    Args:
        taught: Data whose teachers answer the methods.
        manifests: By store; None where it does not exist yet.
        measured: Whether metrics compare with a teacher.

    Raises:
        ValueError: the message says which.
    """
    for data in taught:
        manifest = manifests[data.store]
        found = _answered(phase, data, manifest)
        for spec, method in methods:
            read = {key.pass_name for key in method.teacher_keys} if method.several else {spec.teacher or ""} if method.teacher_keys else ()
            for name in sorted({*read} & found.keys()):
                _check(spec.name, name, found[name].intervention, method.interventions.get(name))
            if method.interventions and manifest is not None and not manifest.rows.paired:
                raise ValueError(
                    f"methods: {spec.name}: the rows of {data.store} have no partners (rows.interchange in the dump's recipe pairs them)"
                )
            if method.interventions and len({answer.weights for name, answer in found.items() if name in read}) > 1:
                raise ValueError(f"methods: {spec.name} expects one model that answers with and without an intervention, found several")
    looking = {"metrics compare": phase.evaluate if measured else [], "probe: it compares": [phase.probed] if phase.probed else []}
    for who, measured_on in looking.items():
        for data in measured_on:
            name = phase.compared(data)
            found = _answered(phase, data, manifests[data.store])
            if name in found and found[name].intervention is not None:
                last = f"the last teacher, {name}," if name else "a teacher"
                raise ValueError(
                    f"{who} with {last} which answers with an intervention: give it before the others, or the pass without one"
                )


def _answered(phase: PhaseSpec, data: DataSpec, manifest: Manifest | None) -> dict[str, Answered]:
    """By teacher, as far as it is known."""
    if phase.live:
        return {name: Answered(spec.intervention, str(spec.model)) for name, spec in phase.live.items()}
    passes = {} if manifest is None else manifest.passes
    first = {name: names(given)[0] for name, given in data.answers.items()}
    return {name: Answered(passes[one].intervention, passes[one].teacher) for name, one in first.items() if one in passes}


def _check(method: str, teacher: str, found: Intervention | None, wanted: Intervention | None) -> None:
    if found != wanted:
        raise ValueError(
            f"methods: {method}: expected {f'teacher {teacher}' if teacher else 'its teacher'} to answer with {_said(wanted)}, "
            f"found {_said(found)}"
        )


def _said(intervention: Intervention | None) -> str:
    return "no intervention" if intervention is None else f"intervention: {{layers: {[list(blocks) for blocks in intervention.layers]}}}"
