"""What is printed of a plan."""

from collections.abc import Iterator, Sequence

from online.figures import size, table
from online.machines import CONTEXT, REACHED, SLACK
from student_train.colocation import Way, trained
from student_train.methods.base import Method
from student_train.plan import Lies, Plan
from student_train.ways import NO_TENSOR_PARALLELISM, STEPS, Choice, advised, nearest, refusals


def report(found: Plan) -> Iterator[str]:
    """What is printed of a plan."""
    paper, machine = found.paper, found.machine
    phase, student = paper.outline.phase, paper.student
    yield f"plan of phase {phase.name} on {machine.name}, from shapes alone: nothing was loaded or run"
    own = f", and {size(4 * paper.own)} of its methods' own" if paper.own else ""
    yield (
        f"\nstudent: {_model(paper.outline.blueprint.shape.family, student.sizes.elements, student.sizes.weights, student.dtype)}"
        f"{', computes in bfloat16' if paper.half else ''}{own}"
    )
    for name, model in paper.teachers.items():
        shape, sizes = model.sizes.loaded.shape, model.sizes
        yield f"teacher{f' {name}' if name else ''}: {_model(shape.family, sizes.elements, sizes.weights, model.dtype)}"
    if paper.stored:
        yield "teacher: none at work; its answers come from a store"
    parts = f" in {phase.accumulation} micro-batches" if phase.accumulation > 1 else ""
    lengths = f"up to {found.rows.longest:,} tokens, {found.rows.lengths.mean():,.0f} on average"
    yield f"rows: {phase.batch_rows} an optimiser step{parts}, of {lengths}"
    yield (
        f"machine: {machine.ranks} {'rank' if machine.ranks == 1 else 'ranks'} with {size(machine.memory)} each, like {machine.like}: "
        f"{machine.flops / 1e12:.3g} TFLOP/s, {size(machine.link)}/s between them ({REACHED:.0%} of the peak); "
        f"{size(machine.host_memory)} of main memory a node"
    )
    for ranks, ways in found.found.items():
        yield f"\non {ranks} {'rank' if ranks == 1 else 'ranks'}, each:"
        yield shown(ways, found.given)
    yield (
        "  weights, moments, gradients: what a rank holds; at work: activations, features and gathered weights at their most; cached: "
        f"allocated and {SLACK:.0%} of the device"
    )
    yield f"  that lies waste; it fits where {size(CONTEXT)} are left for CUDA and its libraries. docs/online.md has the formulas."
    if own_passes := [spec.name for spec, method in paper.outline.methods if _runs_itself(method)]:
        yield f"  not counted: what {', '.join(own_passes)} runs by itself, beside a pass of each teacher and of the student"
    most = max(found.found)
    for reason in refusals(paper, most):
        yield f"\nrefused: {reason}"
    yield f"\n{NO_TENSOR_PARALLELISM}"
    yield f"\nadvice for {most} {'rank' if most == 1 else 'ranks'}, one step after the other (GKD's order):"
    yield from advice(found.found[most])


def advice(found: Sequence[Choice]) -> Iterator[str]:
    """Each step with its best way, up to the first that fits, and how a recipe says it."""
    best = advised(found)
    for number, name in enumerate(STEPS):
        one = nearest(found, number)
        if one is None:
            yield f"  {number + 1} {name}: not possible here"
            continue
        yield f"  {number + 1} {name}: {_named(one)} needs {size(one.cached + CONTEXT)} of {size(one.machine.memory)}{_lacks(one)}"
        if one is best:
            yield f"take {_named(one)}: {seconds_text(one.sample)} a row; in the recipe: {_options(one.way)}"
            return
    yield "nothing fits: take smaller micro-batches (accumulation), trainer: {gradient_checkpointing: true}, or a larger machine"


def shown(found: Sequence[Choice], given: Lies | None) -> str:
    """A table of choices."""
    header = ("teacher", "student", "weights", "moments", "gradients", "at work", "allocated", "cached", "CPU memory", "a row", "")
    lines: list[tuple[str, ...]] = [header]
    for one in found:
        taken, notes = one.memory, "this recipe" if given == (one.way.teacher, one.way.zero) else ""
        work = max(taken.answering, taken.learning, taken.updating)
        parts = (taken.teacher + taken.student, taken.moments, taken.gradients, work, taken.allocated, one.cached, taken.host)
        lacks = _lacks(one).removeprefix(": ")
        lines.append(
            (one.way.sharding, one.way.engine, *map(size, parts), seconds_text(one.sample), ", ".join(filter(None, (notes, lacks))))
        )
    return table(lines, right="23456789")


def plain(found: Plan) -> dict[str, object]:
    """The plan as plain data, in bytes and seconds."""
    best = advised(found.found[max(found.found)])
    return {
        "phase": found.paper.outline.phase.name,
        "machine": found.machine.name,
        "trained_bytes": trained(found.paper),
        "ways": [
            {
                "ranks": ranks,
                "teacher": one.way.sharding,
                "student": one.way.engine,
                "memory": vars(one.memory),
                "allocated": one.memory.allocated,
                "cached": one.cached,
                "seconds_a_row": one.sample,
                "fits": one.fits,
                "step": STEPS[one.step],
            }
            for ranks, ways in found.found.items()
            for one in ways
        ],
        "refused": refusals(found.paper, max(found.found)),
        "advised": None if best is None else {"ranks": best.way.ranks, "teacher": best.way.sharding, "student": best.way.engine},
    }


def seconds_text(seconds: float) -> str:
    """``1.2 s``, ``3.4 ms`` or ``5.6 us``."""
    unit, scale = next(((unit, scale) for unit, scale in (("s", 1.0), ("ms", 1e3)) if seconds * scale >= 1), ("us", 1e6))
    return f"{seconds * scale:.3g} {unit}"


def _runs_itself(method: Method) -> bool:
    """Whether a method runs models in other passes than the step's own, or otherwise."""
    kind = type(method)
    return method.live or method.rewrites or method.perturbs or kind.prepare is not Method.prepare or kind.running is not Method.running


def _model(family: str, elements: int, weights: int, dtype: str) -> str:
    return f"{family}, {elements:,} weights, {size(weights)} in {dtype}"


def _named(one: Choice) -> str:
    teacher = "" if one.way.teacher is None else f"teacher {one.way.sharding}, "
    return f"{teacher}student {one.way.engine}"


def _lacks(choice: Choice) -> str:
    if choice.lacking:
        return f": {size(choice.lacking)} SHORT"
    return f": {size(choice.lacking_host)} of main memory SHORT" if choice.lacking_host else ""


def _options(way: Way) -> str:
    """The way as a recipe says it."""
    parts = []
    if way.teacher is not None and way.teacher.kind != "none":
        offload = "" if way.teacher.offload == "none" else f", offload: {way.teacher.offload}"
        parts.append(f"sharding: {{kind: {way.teacher.kind}, size: {way.teacher.size}{offload}}} of each teacher")
    if way.zero is not None:
        parts.append("zero: {" + ", ".join(f"{name}: {value}" for name, value in way.zero.model_dump(exclude_defaults=True).items()) + "}")
    return ", ".join(parts) or "nothing to add"
