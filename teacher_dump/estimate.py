"""What a dump would take on a machine that is not here: from the teacher's configuration alone, with nothing loaded or run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from online.figures import duration, size
from online.machines import REACHED, UTILISATION, Machine, gpu_reserve, parse_machine
from online.models import load_config, load_tokenizer, model_shape
from online.planner import Units
from store.manifest import Provenance
from store.provenance import provenance
from store.reader import Store
from teacher_dump.amount import Amount
from teacher_dump.choices import Choice, advised, choices, shown
from teacher_dump.recipe import DumpRecipe, FeatureRequest
from teacher_dump.scale import operations, store_bytes
from teacher_dump.scratch import scratch_rows
from teacher_dump.selection import Request, check_rows, resolve
from teacher_dump.sketch import Sketch, sketch


@dataclass(frozen=True)
class Wanted:
    """A machine, and how much text, where it is not that of the recipe."""

    machine: str
    tokens: float | None = None
    length: int | None = None
    """Tokens of a row; the recipe's max_length by default."""
    nodes: int | None = None
    utilisation: float = UTILISATION
    known: Mapping[str, float] = field(default_factory=dict)
    """As online.machines.parse_machine takes them."""


def estimate(recipe: DumpRecipe, wanted: Wanted, command: Sequence[str]) -> str:
    """A report on what `run` would take on the ``wanted`` machine in every sharding that it allows, and which is the cheapest.

    Raises:
        ValueError: a recipe that `run` would refuse, a machine that cannot be read or is too small, or texts that are not here.
    """
    machine = parse_machine(wanted.machine, recipe.teacher.dtype, wanted.known, wanted.nodes, wanted.utilisation)
    teacher, amount = _sketched(recipe, wanted, command)
    batch_tokens = None if recipe.batch_tokens == "auto" else recipe.batch_tokens
    found = choices(teacher, machine, amount, batch_tokens, gpu_reserve(machine))
    return "\n".join(_report(recipe, wanted, machine, teacher, amount, found))


def stored(recipe: DumpRecipe, wanted: Wanted, command: Sequence[str]) -> dict[str, object]:
    """What the pass would hold, as plain data: each stored feature and what follows from it, bytes in all; the machine does not matter.

    Raises:
        ValueError: a recipe that `run` would refuse, or texts that are not here.
    """
    teacher, amount = _sketched(recipe, wanted, command)
    features = {
        spec.key: {"kept_as": spec.kept_as, "unit": spec.feature.unit, "unit_bytes": spec.unit_bytes, "bytes": amount.file_bytes(spec)}
        for spec in teacher.teacher.specs
    }
    derived = {str(key): [str(source) for source in sources] for key, sources in teacher.teacher.plan.derived.items()}
    return {"rows": amount.rows, "tokens": amount.tokens, "stored": features, "derived": derived, "weights": teacher.statics}


def _sketched(recipe: DumpRecipe, wanted: Wanted, command: Sequence[str]) -> tuple[Sketch, Amount]:
    """The teacher without its weights, and how much it has to answer."""
    made = provenance(command)
    requests = _requested(recipe)
    amount = _amount(recipe, wanted, made)
    units = Units(amount.tokens / amount.rows, amount.labelled / amount.rows)
    return sketch(recipe, requests, units, amount.longest, made), amount


def _requested(recipe: DumpRecipe) -> tuple[Request, ...]:
    """What is asked of the teacher; without its tokenizer, words count as so many ids."""
    shape = model_shape(load_config(recipe.teacher.model, recipe.teacher.trust_remote_code), recipe.teacher.head, recipe.teacher.modules)
    try:
        tokenizer: PreTrainedTokenizerBase | None = load_tokenizer(recipe.teacher)
    except ValueError:
        tokenizer = None
        wordless = (wanted.model_copy(update={"words": (), "ids": _numbered(wanted)}) for wanted in recipe.features)
        recipe = recipe.model_copy(update={"features": tuple(wordless)})
    requests = resolve(recipe, shape, tokenizer)
    check_rows(requests, recipe.rows)
    return requests


def _numbered(wanted: FeatureRequest) -> tuple[int, ...]:
    """As many ids as ``wanted`` names words and ids."""
    return tuple(range(len(wanted.ids) + len(wanted.words)))


def _amount(recipe: DumpRecipe, wanted: Wanted, made: Provenance) -> Amount:
    """How much there is to answer: as said, as the store's rows are, or as the texts of the recipe would make."""
    if wanted.tokens is not None:
        return Amount.imagined(wanted.tokens, wanted.length or recipe.rows.max_length, recipe.rows)
    if wanted.length is not None:
        raise ValueError("--length: goes with --tokens, as in --tokens 10e9 --length 512")
    try:
        with scratch_rows(recipe, load_tokenizer(recipe.teacher), made) as (path, _):
            return Amount.of(Store.open(path).rows)
    except ValueError as error:
        raise ValueError(f"{error}\nwithout the texts or the tokenizer, say how much there is, as in --tokens 10e9 --length 512") from None


def _report(
    recipe: DumpRecipe, wanted: Wanted, machine: Machine, teacher: Sketch, amount: Amount, found: Sequence[Choice]
) -> Iterator[str]:
    best = advised(found)
    shape, dtype = teacher.teacher.loaded.shape, recipe.teacher.dtype
    nodes = "one node" if machine.nodes == 1 else f"{machine.nodes} nodes"
    yield f"plan of pass {recipe.pass_name} on {machine.name}, from shapes alone: nothing was loaded, run or written"
    yield (
        f"\nteacher: {shape.family}, head {shape.head}, {shape.layers} blocks of width {shape.width:,}; {teacher.elements:,} weights, "
        f"{size(teacher.weights)} in {dtype}"
    )
    yield (
        f"text: {amount.tokens:,} tokens in {amount.rows:,} rows of up to {amount.longest:,}, {amount.shards:,} shards; "
        f"{amount.padded / amount.tokens - 1:.1%} padding beside them"
    )
    work = operations(teacher, amount)
    yield f"work: {work:.3g} floating-point operations, {work / amount.tokens:.3g} a token"
    written = store_bytes(teacher, amount)
    compressed = ", before compression" if any(spec.compressed for spec in teacher.teacher.specs) else ""
    yield f"store: {size(written)} of features and their weights, {written / amount.tokens:,.1f} bytes a token{compressed}"
    yield (
        f"machine: {machine.ranks} {'rank' if machine.ranks == 1 else 'ranks'} on {nodes}, each with {size(machine.memory)}. Of peaks "
        f"{'as said and otherwise ' if wanted.known else ''}as of {machine.like}, a rank is assumed to reach"
    )
    yield (
        f"  {machine.flops / 1e12:.3g} TFLOP/s ({wanted.utilisation:.0%}) and {REACHED:.0%} of the rest: {size(machine.link)}/s from its "
        f"node, {size(machine.network)}/s from others, {size(machine.host)}/s from main memory"
    )
    yield f"  a node: {size(machine.host_memory)} of main memory, a disk of {size(machine.disk)}/s"
    yield "\neach rank, and the whole pass:"
    yield shown(found)
    yield (
        f"  gathered: weights of other ranks while they are in use; batch: activations and captured features; a rank: all of that and "
        f"{size(best.memory.reserve)} that no tensor gets"
    )
    yield (
        f"\nadvice: {best.name} takes {duration(best.seconds.total)} and {best.hours:,.4g} GPU hours, at "
        f"{amount.tokens / best.seconds.total:,.0f} tokens/s; a rank needs {size(best.memory.device)} of its {size(machine.memory)}, and "
        f"the disk must take {size(written / best.seconds.total)}/s"
    )
    yield f"  {_options(best)}"


def _options(choice: Choice) -> str:
    """The choice as a recipe says it."""
    sharding = choice.sharding
    parts = [f"kind: {sharding.kind}", *([f"size: {sharding.size}"] if sharding.size > 1 else [])]
    parts += [f"offload: {sharding.offload}"] if sharding.offload != "none" else []
    parts += [f"offload_folder: {sharding.offload_folder}"] if sharding.offload_folder else []
    return f"sharding: {{{', '.join(parts)}}}"
