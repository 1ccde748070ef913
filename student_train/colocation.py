"""What student and teachers take of a rank side by side, from shapes alone: memory, and time. docs/online.md has the formulas.

What DeepSpeed holds is read off its code (0.19: stage_1_and_2.py, stage3.py); the columns are those of GKD (Tan et al. 2023,
arXiv 2306.06629, tables 3 and 5).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from online.machines import PROCESS, SLACK, Dtype, Machine
from online.sharding import Sharding
from online.sizes import GATHERED, Sizes, held
from student_train.paper import Paper, Rows
from student_train.zero import BUCKET, Zero

MOMENTS = {"sgd": 0, "rmsprop": 1}
"""Numbers that an optimiser keeps of each weight; two (Adam) where it is not named."""
UPDATE = 28
"""Bytes that a step of Adam moves for each weight: it reads gradient, weight and both moments, and writes the last three."""
HOST_BANDWIDTH = 1e11
"""Bytes a second between main memory and the cores of a node, which its ranks share: an assumption."""


@dataclass(frozen=True)
class Way:
    """One combination of ranks, teacher sharding, student engine and offload."""

    ranks: int
    """Each has its own rows."""
    teacher: Sharding | None
    """Of all teachers; None where none is at work."""
    zero: Zero | None
    """None: the whole student on every rank (DDP)."""

    @property
    def launched(self) -> bool:
        """Whether a launcher starts it, as it does one process whose teacher is sharded: transformers then puts DDP around the student."""
        return self.ranks > 1 or self.zero is not None or (self.teacher is not None and self.teacher.kind != "none")

    @property
    def engine(self) -> str:
        """How the student lies."""
        if self.zero is None:
            return "ddp" if self.launched else "plain"
        offloads = [("optimizer", self.zero.offload_optimizer), ("parameters", self.zero.offload_parameters)]
        offloaded = [name for name, where in offloads if where != "none"]
        return f"zero-{self.zero.stage}" + (f" + {', '.join(offloaded)} to cpu" if offloaded else "")

    @property
    def sharding(self) -> str:
        """How the teachers lie."""
        if self.teacher is None:
            return "-"
        return self.teacher.kind if self.teacher.offload == "none" else f"{self.teacher.kind} + {self.teacher.offload}"

    @property
    def offloads(self) -> bool:
        student = self.zero is not None and self.zero.offload_optimizer != "none"
        return student or (self.teacher is not None and self.teacher.offload != "none")


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    teacher: float
    """Its part of the teachers' weights, and buffers."""
    student: float
    """Its part of the student's weights and those of the methods; under ZeRO a copy of the part beside them, which is updated."""
    moments: float
    """The optimiser's."""
    gradients: float
    """Those that stay, and what they are sent in."""
    answering: float
    """While teachers answer: activations of one, weights that it gathers, features of those before it."""
    learning: float
    """While the student learns: activations, gradients as they come, gathered weights, features of the teachers; under ZeRO-3 also
    gradients laid out to be sent."""
    updating: float
    """While the optimiser takes a step."""
    host: float
    """In main memory: the process, and what is offloaded."""

    @property
    def allocated(self) -> float:
        """Most bytes of tensors on the device at once."""
        return self.teacher + self.student + self.moments + self.gradients + max(self.answering, self.learning, self.updating)


def cached(memory: Memory, machine: Machine) -> float:
    """Bytes that torch takes of a GPU for so many allocated ones: what lies waste between tensors is an assumption."""
    return memory.allocated + SLACK * machine.memory


def memory(paper: Paper, way: Way, rows: Rows) -> Memory:
    """Peak bytes of a rank, in a micro-batch of the longest rows."""
    phase, ranks, zero = paper.outline.phase, way.ranks, way.zero
    size = phase.batch_rows // phase.accumulation // ranks
    working = paper.working(size, rows.longest, rows.labels(size, rows.longest))
    weights = trained(paper)
    part, bucket, adam = weights / ranks, 4.0 * min(weights // 4, BUCKET), MOMENTS.get(str(phase.trainer.get("optim")), 2)
    several = phase.accumulation > 1
    host, gathered, updating = PROCESS, 0.0, 0.0
    if zero is None:
        student, moments = weights, adam * weights
        gradients = (weights if way.launched else 0.0) + (weights if several else 0.0)  # DDP sends copies
        learning = working.student if several else working.learning
    else:
        student = weights + part if zero.stage < 3 else 2 * part  # beside what runs, float32 weights that are updated
        moments, learning = adam * part, working.student
        gradients = bucket + part + (part if zero.stage == 2 and several else 0.0) + (weights if zero.stage == 1 and several else 0.0)
        updating = part if zero.stage == 3 else max(0.0, part - bucket)  # the part's gradients in one piece; without the bucket
        if zero.stage == 3:
            gathered = bucket + min(GATHERED["zero3"](paper.student.sizes, size * rows.longest), 2 * weights)
        if zero.offload_optimizer != "none":
            student, moments, updating = (weights if zero.stage < 3 else part), 0.0, 0.0
            gradients = bucket + paper.student.sizes.embedding + (weights if zero.stage == 1 and several else 0.0)
            host += (3 + adam) * part  # weights twice or with their gradients twice, gradients, moments
        if zero.offload_parameters != "none":
            student = 0.0
            host += part
    answering = working.teachers
    own = 0.0
    if way.teacher is not None:
        offloaded = way.teacher.offload != "none"
        shares = sum(held(model, way.teacher) for model in paper.present)
        own = sum(model.buffers for model in paper.present) + (0.0 if offloaded else shares)
        host += shares if offloaded else 0.0
        answering += max(_gathered(model, way.teacher, size * rows.longest) for model in paper.present)
    return Memory(
        teacher=own,
        student=student + paper.student.sizes.buffers,
        moments=moments,
        gradients=gradients,
        answering=answering,
        learning=learning + gathered + working.features,
        updating=updating,
        host=host,
    )


def trained(paper: Paper) -> float:
    """Bytes of the weights that train: the student's and the methods'."""
    return float(paper.student.sizes.weights + 4 * paper.own)


def _gathered(model: Sizes, sharding: Sharding, tokens: int) -> float:
    whole = model.weights if sharding.size > 1 or sharding.offload != "none" else 0.0
    return min(GATHERED[sharding.kind](model, tokens), 2 * whole)


@dataclass(frozen=True)
class Seconds:
    """Of an optimiser step. Nothing is taken to overlap."""

    computing: float
    exchanging: float
    """Weights, gradients or activations between ranks."""
    offloading: float
    """Between main memory and the device, and the optimiser's step there."""

    @property
    def total(self) -> float:
        return self.computing + self.exchanging + self.offloading


def seconds(paper: Paper, way: Way, rows: Rows, machines: Mapping[Dtype, Machine]) -> Seconds:
    """Seconds of an optimiser step.

    Args:
        machines: The same machine as fast as it is in each type.
    """
    phase, ranks, zero = paper.outline.phase, way.ranks, way.zero
    micro, size = phase.accumulation, phase.batch_rows // phase.accumulation // ranks
    tokens = rows.mean(size)
    labelled = rows.labels(size, tokens)
    machine = machines[paper.computes]
    passes = 4 if paper.recomputes else 3  # backward twice what forward is
    computing = micro * passes * paper.student.operations(size, tokens, labelled) / machine.flops
    link, others, weights = machine.between(ranks), (ranks - 1) / ranks, trained(paper)
    part = weights if zero is None else weights / ranks
    received = _student_received(zero, micro, weights) * others
    offloading = 0.0
    for model in paper.teachers.values():
        computing += micro * model.operations(size, tokens, labelled) / machines[model.dtype].flops
        received += micro * _teacher_received(model.sizes, way, size * tokens) * model.runs
        if way.teacher is not None and way.teacher.offload != "none":
            offloading += micro * model.runs * held(model.sizes, way.teacher) / machine.host
    if zero is not None and zero.offload_optimizer != "none":
        node = min(machine.node_ranks, ranks)
        offloading += 2 * part / machine.host + UPDATE / 4 * part / (HOST_BANDWIDTH / node)
    else:
        computing += UPDATE / 4 * part / machine.bandwidth
    if zero is not None and zero.offload_parameters != "none":
        offloading += 2 * micro * part / machine.host
    return Seconds(computing, received / link, offloading)


def _student_received(zero: Zero | None, micro: int, weights: float) -> float:
    """Bytes that a rank receives for a step, of many ranks: Rajbhandari et al. 2020, section 7."""
    if zero is None or zero.stage == 1:
        return 2 * weights  # gradients are summed and gathered (DDP), or summed and weights gathered
    if zero.stage == 2:
        return (micro + 1) * weights  # gradients are summed for every micro-batch
    return 3 * micro * weights  # weights are gathered forward and backward, and gradients summed


def _teacher_received(model: Sizes, way: Way, tokens: float) -> float:
    """Bytes that a rank receives while the teacher answers everybody's micro-batches of ``tokens`` padded tokens."""
    assert way.teacher is not None
    others, shape = (way.ranks - 1) / way.ranks, model.loaded.shape
    if way.teacher.kind in ("zero3", "fsdp"):
        return model.weights * others
    if way.teacher.kind == "tp":  # two sums of hidden states a block and one of embeddings, each passing twice, for every rank's rows
        return way.ranks * 2 * (2 * shape.layers + 1) * tokens * shape.width * model.itemsize * others
    return 0.0
