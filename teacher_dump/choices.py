"""The ways in which a teacher can lie over the ranks of a machine, and what a dump takes in each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from online.figures import duration, size, table
from online.machines import Machine
from online.sharding import Kind, Sharding
from online.sizes import splits
from teacher_dump.amount import Amount
from teacher_dump.scale import Memory, Seconds, memory, seconds
from teacher_dump.sketch import Sketch

_ANY_DISK = Path("FOLDER")


@dataclass(frozen=True)
class Choice:
    """One way, with what it takes."""

    sharding: Sharding
    batch_tokens: int
    """Padded tokens of a batch."""
    memory: Memory
    seconds: Seconds
    machine: Machine

    @property
    def name(self) -> str:
        offload = "" if self.sharding.offload == "none" else f" + {self.sharding.offload}"
        return f"{self.sharding.kind}{offload} × {self.sharding.size}"

    @property
    def hours(self) -> float:
        """Of all ranks together."""
        return self.machine.ranks * self.seconds.total / 3600

    @property
    def lacking(self) -> float:
        """Bytes that a device has too few; 0 where the teacher fits."""
        return max(0.0, self.memory.device - self.machine.memory)

    @property
    def lacking_host(self) -> float:
        """Bytes that the main memory of a node has too few."""
        return max(0.0, self.memory.host * self.machine.node_ranks - self.machine.host_memory)

    @property
    def fits(self) -> bool:
        return not self.lacking and not self.lacking_host


def choices(sketch: Sketch, machine: Machine, amount: Amount, batch_tokens: int | None, reserve: float) -> list[Choice]:
    """What a dump takes for every sharding that the ranks of ``machine`` can be divided into and the teacher can be run in.

    Args:
        batch_tokens: Padded tokens of a batch; None for the most that fit.
        reserve: Bytes of a device that are taken before there is a model.
    """
    found = []
    for sharding in shardings(sketch, machine.ranks, machine.own_memory):
        tokens = batch_tokens or _largest(sketch, sharding, machine, amount, reserve)
        batch = batch_bytes(sketch, amount, tokens, exactly=batch_tokens is not None)
        taken = memory(sketch, sharding, batch, tokens, amount, reserve)
        found.append(Choice(sharding, tokens, taken, seconds(sketch, sharding, machine, amount, tokens), machine))
    return found


def batch_bytes(sketch: Sketch, amount: Amount, tokens: int, exactly: bool = True) -> float:
    """Bytes that a batch of so many padded tokens takes beside the weights, all in the longest rows.

    Args:
        exactly: Or along the line through two batches that are counted: what takes most may change with the size, so that the
            truth lies below the line between them, and on it beyond.
    """

    def counted(rows: int) -> int:
        return sketch.batch_bytes(rows, amount.longest, round(rows * amount.longest * amount.labelled / amount.tokens))

    rows = max(1, tokens // amount.longest)
    if exactly:
        return counted(rows)
    low, high = (1, 8) if rows <= 8 else (8, 16)
    return counted(low) + (counted(high) - counted(low)) / (high - low) * (rows - low)


def _largest(sketch: Sketch, sharding: Sharding, machine: Machine, amount: Amount, reserve: float) -> int:
    """Padded tokens of the largest batch that fits, a power of two or one row, and at most those of a shard."""
    tokens = amount.longest
    larger = 1 << tokens.bit_length()
    while larger <= amount.room:
        batch = batch_bytes(sketch, amount, larger, exactly=False)
        if memory(sketch, sharding, batch, larger, amount, reserve).device > machine.memory:
            break
        tokens, larger = larger, 2 * larger
    return tokens


def shardings(sketch: Sketch, ranks: int, offload: bool) -> Iterator[Sharding]:
    """Every sharding that so many ranks can be divided into and the teacher can be run in, the simplest first.

    Args:
        offload: Whether the devices have a memory of their own, so that weights can lie elsewhere.
    """
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    kinds: tuple[Kind, ...] = ("none", "zero3", "fsdp", "tp")
    for kind in kinds:
        for count in sizes:
            if (kind == "none") == (count == 1) and (kind != "tp" or splits(sketch, count)):
                yield Sharding(kind=kind, size=count)
    if offload:
        most_first = sizes[::-1]  # that hold the fewest copies in main memory
        yield from (Sharding(kind="zero3", size=count, offload="cpu") for count in most_first)
        yield from (Sharding(kind="zero3", size=count, offload="nvme", offload_folder=_ANY_DISK) for count in most_first)


def advised(found: Sequence[Choice]) -> Choice:
    """The simplest of the choices that fit and take at most a tenth more hours than the cheapest: the formulas are no more exact.

    Raises:
        ValueError: none fits; names the smallest machines that would do.
    """
    fitting = [choice for choice in found if choice.fits]
    if not fitting:
        raise ValueError(_too_small(found))
    least = min(choice.hours for choice in fitting)
    return next(choice for choice in fitting if choice.hours <= 1.1 * least)


def _too_small(found: Sequence[Choice]) -> str:
    machine = found[0].machine
    ways = []
    if with_main := [one for one in found if not one.lacking_host]:
        least = min(with_main, key=lambda one: one.lacking)
        ways.append(f"{machine.ranks} devices of {size(least.memory.device)} ({least.name})")
    if with_devices := [one for one in found if not one.lacking]:
        least = min(with_devices, key=lambda one: one.lacking_host)
        ways.append(f"{size(least.memory.host * machine.node_ranks)} of main memory in a node ({least.name}; --host-memory)")
    nearest = min(found, key=lambda one: one.lacking + one.lacking_host)
    why = _lacks(nearest) if nearest.name else ""
    return f"the teacher does not fit on {machine.name} in any way; {nearest.name} is {why}. The smallest that does: {' or '.join(ways)}"


def _lacks(choice: Choice) -> str:
    if choice.lacking:
        return f"{size(choice.lacking)} SHORT"
    return f"{size(choice.lacking_host)} of main memory SHORT" if choice.lacking_host else ""


def shown(found: Sequence[Choice], notes: Sequence[str] = ()) -> str:
    """A table of choices, with a note on each and what it lacks; main memory where it is another than that of the devices."""
    own = found[0].machine.own_memory
    hours = "GPU hours" if own else "rank hours"
    lines = [["", "weights", "gathered", "batch", "a rank", *(["main memory"] if own else []), "batch of", "time", hours, "mostly", ""]]
    for number, one in enumerate(found):
        taken = one.memory
        parts = [taken.weights, taken.gathered, taken.batch, taken.device, *([taken.host] if own else [])]
        lines.append(
            [
                one.name,
                *map(size, parts),
                f"{one.batch_tokens:,}",
                duration(one.seconds.total),
                f"{one.hours:,.0f}" if one.hours >= 100 else f"{one.hours:.2g}",
                one.seconds.mostly,
                ", ".join(filter(None, (notes[number] if notes else "", _lacks(one)))),
            ]
        )
    return table(lines, right="12345678" if own else "1234567")
