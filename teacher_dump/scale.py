"""What a dump takes of a machine, from shapes alone: memory of a rank, and time. docs/scale.md has the formulas with their symbols."""

from dataclasses import dataclass

from online.machines import PROCESS, Machine
from online.sharding import Sharding
from online.sizes import GATHERED, held
from teacher_dump.amount import Amount
from teacher_dump.pipeline import SHARDS
from teacher_dump.sketch import Sketch

SWAPPED = 6
"""Parts in main memory on their way from an NVMe disk (online.offload)."""


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one rank."""

    weights: float
    """Its part of the weights, and buffers."""
    gathered: float
    """What comes from other ranks, weights for the most part, while it is in use."""
    batch: float
    """Activations, captured features, and what is made of them before it goes to the host."""
    reserve: float
    """Taken before there is a model."""
    host: float
    """In main memory, beside a device that has its own: the process, answers on their way to the disk, offloaded weights."""

    @property
    def device(self) -> float:
        return self.weights + self.gathered + self.batch + self.reserve


@dataclass(frozen=True)
class Seconds:
    """How long the whole pass takes. Computing and the two kinds of waiting add up; writing goes on behind them."""

    computing: float
    exchanging: float
    """Weights or activations between ranks."""
    loading: float
    """Offloaded weights to the devices."""
    writing: float

    @property
    def total(self) -> float:
        return max(self.computing + self.exchanging + self.loading, self.writing)

    @property
    def mostly(self) -> str:
        """What takes most of the time."""
        parts = {"computing": self.computing, "exchange": self.exchanging, "offload": self.loading}
        return "disk" if self.writing >= self.total else max(parts, key=lambda name: parts[name])


def memory(sketch: Sketch, sharding: Sharding, batch: float, tokens: int, amount: Amount, reserve: float) -> Memory:
    """Peak bytes of a rank.

    Args:
        batch: Bytes that a batch of ``tokens`` padded tokens takes beside the weights.
        reserve: Bytes that are taken before there is a model.
    """
    own, offloaded = held(sketch, sharding), sharding.offload != "none"
    whole = sketch.weights if offloaded or sharding.size > 1 else 0.0
    waiting = SHARDS * sum(amount.shard_bytes(spec) for spec in sketch.teacher.specs)
    kept = {"none": 0.0, "cpu": own, "nvme": SWAPPED * sketch.embedding / sharding.size}[sharding.offload]
    return Memory(
        weights=sketch.buffers + (0.0 if offloaded else own),
        gathered=min(GATHERED[sharding.kind](sketch, tokens), 2 * whole),
        batch=batch,
        reserve=reserve,
        host=PROCESS + waiting + kept,
    )


def operations(sketch: Sketch, amount: Amount) -> float:
    """Floating-point operations of the forward passes over all rows."""
    flops, words = sketch.flops, sketch.words(amount.padded, amount.rows, amount.labelled)
    once = flops.token * amount.padded + flops.pair * amount.pairs + flops.row * amount.rows + flops.word * words
    return sketch.teacher.runs * once


def store_bytes(sketch: Sketch, amount: Amount) -> float:
    """Bytes of the features and of the weights that derivations need."""
    return sum(amount.file_bytes(spec) for spec in sketch.teacher.specs) + sketch.statics


def seconds(sketch: Sketch, sharding: Sharding, machine: Machine, amount: Amount, batch_tokens: int) -> Seconds:
    """Seconds of the whole pass in batches of ``batch_tokens`` padded tokens, with the ranks of ``machine`` as ``sharding`` says.

    Nothing is assumed to overlap but writing; ranks wait for nothing but the last shard.
    """
    size, alike = sharding.size, sharding.kind == "tp"
    together = size if alike else 1  # ranks that answer one batch
    workers = min(machine.ranks // together, amount.shards)
    waves = -(-amount.shards // workers) * workers / amount.shards  # the last shards leave ranks idle
    forwards = sketch.teacher.runs * amount.padded / max(batch_tokens, amount.longest) / workers * waves
    reading = forwards * held(sketch, sharding if alike else Sharding()) / machine.bandwidth
    computing = operations(sketch, amount) / (machine.flops * together) / workers * waves
    received = _received(sketch, sharding, max(batch_tokens, amount.longest), amount)
    own, share = held(sketch, sharding), min(machine.node_ranks, machine.ranks)
    loaded = {"none": 0.0, "cpu": own / machine.host, "nvme": own * share / machine.disk}[sharding.offload]
    writing = store_bytes(sketch, amount) / (machine.disk * machine.nodes)
    return Seconds(
        computing=max(computing, reading) + (0.0 if machine.own_memory else writing),  # a CPU writes with the cores that compute
        exchanging=forwards * received / machine.between(size),
        loading=forwards * loaded,
        writing=writing,
    )


def _received(sketch: Sketch, sharding: Sharding, tokens: float, amount: Amount) -> float:
    """Bytes that a rank receives from the others of its replica while it answers a batch of ``tokens`` padded tokens."""
    size, shape = sharding.size, sketch.teacher.loaded.shape
    if sharding.kind in ("zero3", "fsdp"):
        return sketch.weights * (size - 1) / size
    if sharding.kind != "tp":
        return 0.0
    share = tokens / amount.padded
    words = sketch.words(tokens, amount.rows * share, amount.labelled * share)
    # Two sums of hidden states a block and one of embeddings, each a ring that passes every number twice; and the word logits.
    numbers = 2 * (2 * shape.layers + 1) * tokens * shape.width + words * shape.vocab
    return numbers * sketch.itemsize * (size - 1) / size
