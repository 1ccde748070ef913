"""The ways in which student and teachers can lie over ranks, which of them are refused, and in which order to try them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from online.machines import CONTEXT, Dtype, Machine
from online.sharding import Kind, Sharding
from online.sizes import splits
from student_train.colocation import Memory, Seconds, Way, cached, memory, seconds
from student_train.paper import Paper, Rows
from student_train.unsafe import check_zero
from student_train.zero import Zero

STEPS = (
    "nothing shared out",
    "optimiser states and gradients (ZeRO-1, ZeRO-2)",
    "weights: teachers in parts (tp, zero3, fsdp), the student too (ZeRO-3)",
    "offload to main memory",
)
"""What to try one after the other: GKD's order (Tan et al. 2023, arXiv 2306.06629)."""

NO_TENSOR_PARALLELISM = (
    "student in tensor parallel: not offered. Methods compare whole features, and features of split heads are gathered without a gradient; "
    "what its ranks would share out, ZeRO shares out as well (zero: {stage: 3})"
)


@dataclass(frozen=True)
class Choice:
    """One way, with what it takes."""

    way: Way
    memory: Memory
    seconds: Seconds
    machine: Machine
    rows: int
    """Of an optimiser step."""

    @property
    def cached(self) -> float:
        """Bytes that torch takes of a GPU."""
        return cached(self.memory, self.machine)

    @property
    def sample(self) -> float:
        """Seconds of a row, all ranks working side by side."""
        return self.seconds.total / self.rows

    @property
    def lacking(self) -> float:
        """Bytes that a device has too few; 0 where it fits."""
        return max(0.0, self.cached + CONTEXT - self.machine.memory)

    @property
    def lacking_host(self) -> float:
        """Bytes that the main memory of a node has too few."""
        return max(0.0, self.memory.host * min(self.machine.node_ranks, self.way.ranks) - self.machine.host_memory)

    @property
    def fits(self) -> bool:
        return not self.lacking and not self.lacking_host

    @property
    def step(self) -> int:
        """Number of the first of STEPS that has it."""
        way = self.way
        if way.offloads:
            return 3
        if (way.teacher is not None and way.teacher.kind != "none") or (way.zero is not None and way.zero.stage == 3):
            return 2
        return 0 if way.zero is None else 1


def choices(paper: Paper, ranks: int, rows: Rows, machines: Mapping[Dtype, Machine]) -> list[Choice]:
    """What a phase takes on so many ranks in every way that nothing refuses, the simplest first.

    Args:
        machines: The machine as fast as it is in each type.
    """
    machine, phase = machines[paper.computes], paper.outline.phase
    found = []
    for way in ways(paper, ranks):
        if not refusal(paper, way):
            taken = memory(paper, way, rows), seconds(paper, way, rows, machines)
            found.append(Choice(way, *taken, machine, phase.batch_rows))
    return found


def ways(paper: Paper, ranks: int) -> Iterator[Way]:
    """Every combination for so many ranks, refused ones too."""
    for zero in students(ranks):
        for teacher in teachers(paper, ranks):
            yield Way(ranks, teacher, zero)


def teachers(paper: Paper, ranks: int) -> list[Sharding | None]:
    """How the teachers can lie over so many ranks."""
    if not paper.teachers:
        return [None]
    found: list[Sharding | None] = [Sharding()]
    if any(model.loaded.custom is not None for model in paper.present):
        return found
    kinds: tuple[Kind, ...] = ("zero3", "fsdp", "tp")
    for kind in kinds if ranks > 1 else ():
        if kind != "tp" or all(splits(model, ranks) for model in paper.present):
            found.append(Sharding(kind=kind, size=ranks))
    return [*found, Sharding(kind="zero3", size=ranks, offload="cpu")]


def students(ranks: int) -> list[Zero | None]:
    """How the student can lie over so many ranks. One alone has nothing to share out, but may offload.

    Parameters go to main memory after the optimiser's state, which is three times as much.
    """
    shared = [Zero(stage=stage) for stage in (1, 2, 3)] if ranks > 1 else []
    offloaded = [Zero(stage=stage, offload_optimizer="cpu") for stage in (1, 2, 3)]
    return [None, *shared, *offloaded, Zero(stage=3, offload_optimizer="cpu", offload_parameters="cpu")]


def refusal(paper: Paper, way: Way) -> str:
    """Why the phase cannot run in this way; empty if it can."""
    phase, methods = paper.outline.phase, paper.outline.methods
    whole = next((spec.name for spec, method in methods if method.trains_teacher), None)
    if way.teacher is not None and way.teacher.kind != "none" and whole is not None:
        return f"a teacher in parts: {whole} trains its teacher on every rank; expected sharding kind none"
    try:
        check_zero(phase.model_copy(update={"zero": way.zero}), methods)
    except ValueError as error:
        return str(error).removeprefix(f"phase {phase.name!r}: ").partition("; give ")[0]
    return ""


def refusals(paper: Paper, ranks: int) -> list[str]:
    """Each reason for which ways are refused, once."""
    return list(dict.fromkeys(why for way in ways(paper, ranks) if (why := refusal(paper, way))))


def nearest(found: Sequence[Choice], step: int) -> Choice | None:
    """The fastest choice of a step that fits, or else the one that lacks least; None where the step has none."""
    own = [one for one in found if one.step == step]
    fitting = [one for one in own if one.fits]
    if fitting:
        return min(fitting, key=lambda one: one.sample)
    return min(own, key=lambda one: one.lacking + one.lacking_host, default=None)


def advised(found: Sequence[Choice]) -> Choice | None:
    """The first in GKD's order that fits; None where none does."""
    return next((one for step in range(len(STEPS)) if (one := nearest(found, step)) is not None and one.fits), None)
