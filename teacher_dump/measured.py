"""What a dump takes of the machine that it was measured on, and what it would take there in other shardings."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from online.figures import duration, size
from online.machines import DISK, GPUS, REACHED, Machine, gpu_reserve
from online.planner import Units
from online.replica import Replica
from online.sharding import Sharding
from store.reader import Store
from teacher_dump.amount import Amount
from teacher_dump.batches import padding
from teacher_dump.choices import Choice, batch_bytes, choices, shown
from teacher_dump.pipeline import memory_limit
from teacher_dump.recipe import DumpRecipe
from teacher_dump.scale import Seconds, memory, operations, seconds
from teacher_dump.sketch import Sketch, sketch
from teacher_dump.teacher import TeacherPass
from teacher_dump.timing import Timing

CPU_LINK = 5e8
"""Bytes a second that gloo brings to a process from others of its machine (benchmarks/results/scale.json)."""
PCIE = 16e9
"""Bytes a second of what is known of no GPU of this name."""


def needs(teacher: TeacherPass, store: Store, pending: Sequence[int], timing: Timing, written: int, replica: Replica) -> Iterator[str]:
    """Time and memory of the ``pending`` shards, as measured; their files have ``written`` bytes."""
    tokens = int(store.rows.slot_tokens[list(pending)].sum())
    seconds = timing.seconds(written, _workers(replica, teacher.alike))
    hours, kind = replica.job_size * seconds / 3600, "GPU hours" if timing.device_memory else "rank hours"
    where = torch.cuda.get_device_name(teacher.device) if timing.device_memory else f"{teacher.device}, {torch.get_num_threads()} threads"
    ranks = "" if replica.job_size == 1 else f" on {replica.job_size} ranks"
    yield (
        f"time: {duration(seconds)}{ranks}, {hours:,.2g} {kind}, at {tokens / max(seconds, 1e-9):,.0f} tokens/s, "
        f"measured on {timing.batches} real batches ({where}), after building rows and loading the teacher"
    )
    yield f"batches: {teacher.batch_tokens:,} tokens; {padding(store.rows, pending):.1%} of padding is computed beside the text"
    waiting = memory_limit(store.rows, teacher.specs)
    gpu = f", and {size(timing.device_memory)} on the GPU" if timing.device_memory else ""
    each = "" if replica.job_size == 1 else " for each rank"
    yield f"memory: up to {size(timing.memory + waiting)}{each}, of which {size(waiting)} are shards waiting to be written{gpu}"


def other_shardings(
    recipe: DumpRecipe,
    teacher: TeacherPass,
    store: Store,
    pending: Sequence[int],
    timing: Timing,
    written: int,
    replica: Replica,
    ranks: int | None,
) -> Iterator[str]:
    """What the ``pending`` shards would take in other shardings of so many ``ranks``: calculated, at the speed that was measured."""
    amount = Amount.of(store.rows, pending)
    plain = sketch(recipe, teacher.requests, Units.average(store.rows), amount.longest, teacher.info.made)
    machine = _machine(teacher.device, replica.job_size, timing, plain, amount, recipe.sharding)
    waiting = 0 if machine.own_memory else memory_limit(store.rows, teacher.specs)
    here = _present(recipe.sharding, plain, amount, teacher.batch_tokens, timing, written, machine, waiting)
    ranks = ranks or (replica.job_size if replica.job_size > 1 else _ranks(teacher.device))
    others = choices(plain, _with_ranks(machine, ranks), amount, teacher.batch_tokens, here.memory.reserve)
    if ranks == replica.job_size:
        others = [one for one in others if one.sharding != recipe.sharding]
    yield f"\nthis sharding on {_count(replica.job_size)} as measured, and others on {_count(ranks)} as calculated (docs/scale.md):"
    yield shown([here, *others], ["measured", *("calculated" for _ in others)])


def _present(
    sharding: Sharding, plain: Sketch, amount: Amount, tokens: int, timing: Timing, written: int, machine: Machine, waiting: int
) -> Choice:
    """The choice that was measured; what it needs before there is a model makes up the rest of what was measured."""
    workers = machine.ranks // (sharding.size if sharding.kind == "tp" else 1)
    taken = memory(plain, sharding, batch_bytes(plain, amount, tokens), tokens, amount, gpu_reserve(machine) if machine.own_memory else 0.0)
    if machine.own_memory:
        taken = replace(taken, batch=max(0.0, timing.device_memory - taken.weights - taken.gathered))
    else:
        taken = replace(taken, reserve=max(0.0, timing.memory - taken.device) + waiting)
    took = Seconds(timing.seconds(written, workers), 0.0, 0.0, 0.0)
    return Choice(sharding, tokens, taken, took, machine)


def _machine(device: torch.device, ranks: int, timing: Timing, plain: Sketch, amount: Amount, sharding: Sharding) -> Machine:
    """This one, as fast as it was measured to be."""
    gpu = device.type == "cuda"
    like = next((name for name in GPUS if gpu and name.partition("-")[0] in torch.cuda.get_device_name(device)), "")
    link = GPUS[like].link * REACHED if like else PCIE * REACHED if gpu else CPU_LINK
    machine = Machine(
        name="this machine",
        ranks=ranks,
        nodes=1,
        memory=torch.cuda.get_device_properties(device).total_memory if gpu else _main_memory() / ranks,
        flops=1.0,
        bandwidth=math.inf,
        link=link,
        network=link,
        host=(GPUS[like].host if like else PCIE) * REACHED,
        host_memory=_main_memory() if gpu else math.inf,
        disk=1 / timing.write_rate if timing.write_rate else DISK,
        own_memory=gpu,
    )
    together = sharding.size if sharding.kind == "tp" else 1
    taught = timing.rate * timing.padded * together / ranks  # of all ranks side by side
    exchanged = seconds(plain, sharding, machine, amount, amount.longest).exchanging
    return replace(machine, flops=operations(plain, amount) / (max(taught - exchanged, taught / 2) * ranks))


def _with_ranks(machine: Machine, ranks: int) -> Machine:
    """The same with so many ranks, which share a CPU."""
    if machine.own_memory:
        return replace(machine, ranks=ranks)
    share = _share(ranks) / _share(machine.ranks)
    return replace(machine, ranks=ranks, memory=_main_memory() / ranks, flops=machine.flops * share)


def _share(ranks: int) -> float:
    """Part of its speed that a rank has beside the others on the cores."""
    return min(1.0, (os.cpu_count() or 1) / (ranks * torch.get_num_threads()))


def _ranks(device: torch.device) -> int:
    return torch.cuda.device_count() if device.type == "cuda" else os.cpu_count() or 1


def _workers(replica: Replica, alike: bool) -> int:
    """Ranks, or sets of ranks, that answer batches side by side."""
    return replica.job_size // (replica.size if alike else 1)


def _main_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _count(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"{ranks} ranks"
