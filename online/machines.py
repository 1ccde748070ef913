"""Machines that may be planned for without having them: how many ranks, and what one of them holds, computes and receives."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from online.figures import read_bytes
from online.flops import peak_flops

Dtype = Literal["float32", "bfloat16", "float16"]

RANKS_A_NODE = 8


class Gpu(NamedTuple):
    """Bytes, and bytes a second in one direction. Operations a second are in online.flops."""

    memory: float
    bandwidth: float
    """Between its memory and its cores."""
    link: float
    """From GPUs of the same node: NVLink where there is one, PCIe otherwise."""
    network: float
    """From GPUs of other nodes: the adapter that the vendor's own system has for each GPU."""
    host: float
    """From main memory: PCIe x16, of the generation that it has."""


GPUS: dict[str, Gpu] = {
    "V100-16GB": Gpu(16e9, 900e9, 150e9, 6.25e9, 16e9),  # V100 datasheet; DGX-1 user guide
    "V100-32GB": Gpu(32e9, 900e9, 150e9, 6.25e9, 16e9),
    "T4": Gpu(16e9, 320e9, 16e9, 6.25e9, 16e9),  # T4 datasheet; the adapter is an assumption
    "A10": Gpu(24e9, 600e9, 32e9, 12.5e9, 32e9),  # A10 datasheet; the adapter is an assumption
    "L4": Gpu(24e9, 300e9, 32e9, 12.5e9, 32e9),  # L4 datasheet; the adapter is an assumption
    "A100-40GB": Gpu(40e9, 1555e9, 300e9, 25e9, 32e9),  # A100 datasheet (SXM); DGX A100 datasheet
    "L40S": Gpu(48e9, 864e9, 32e9, 25e9, 32e9),  # L40S datasheet; the adapter is an assumption
    "A100-80GB": Gpu(80e9, 2039e9, 300e9, 25e9, 32e9),
    "H100": Gpu(80e9, 3350e9, 450e9, 50e9, 64e9),  # H100 datasheet (SXM); DGX H100 datasheet
    "H200": Gpu(141e9, 4800e9, 450e9, 50e9, 64e9),  # H200 datasheet
    "B200": Gpu(180e9, 8000e9, 900e9, 50e9, 64e9),  # DGX B200 datasheet, an eighth of it
}
"""Vendor's figures, from NVIDIA's datasheets; NVLink at half of the sum of both directions."""

UTILISATION, REACHED = 0.4, 0.7
"""Parts of the peak operations a second, and of the peak bytes a second, that are assumed to be reached."""
HOST_MEMORY, DISK = 1e12, 3e9
"""Bytes of main memory of a node, and bytes a second of its disk, of which nothing is said: assumptions."""
CONTEXT, SLACK = 1.5e9, 0.05
"""Bytes on a GPU that CUDA, its libraries and the communication take, and the part of its memory that lies waste between tensors."""
PROCESS = 3e9
"""Bytes of main memory of a process with torch, transformers and a GPU's libraries."""

_ALIASES = {"A100": "A100-80GB", "V100": "V100-32GB", "H100-80GB": "H100", "H200-141GB": "H200"}


@dataclass(frozen=True)
class Machine:
    """Ranks with a device each. Rates are what a rank reaches, not peaks."""

    name: str
    ranks: int
    nodes: int
    memory: float
    """Bytes of a device."""
    flops: float
    """Operations a second in the type that was asked for."""
    bandwidth: float
    """Bytes a second between a device's memory and its cores."""
    link: float
    """Bytes a second from other ranks of the node."""
    network: float
    """Bytes a second from ranks of other nodes."""
    host: float
    """Bytes a second from main memory."""
    host_memory: float
    """Bytes of main memory of a node."""
    disk: float
    """Bytes a second from and to the disk of a node."""
    own_memory: bool = True
    """Whether devices have a memory beside the main one, as GPUs do."""
    like: str = ""
    """GPU whose figures stand in for what is not said; empty for a machine that was measured."""

    @property
    def node_ranks(self) -> int:
        return -(-self.ranks // self.nodes)

    def between(self, ranks: int) -> float:
        """Bytes a second that one of so many ranks receives from the others: they fill one node after the other."""
        return self.link if ranks <= self.node_ranks else min(self.link, self.network)


def parse_machine(
    text: str, dtype: Dtype, known: Mapping[str, float], nodes: int | None = None, utilisation: float = UTILISATION
) -> Machine:
    """The machine that ``text`` names, such as ``8x40GB``, ``8xA100-40GB`` or ``16xH100``.

    What a number of bytes leaves open is taken from the GPU that comes next to it in memory.

    Args:
        dtype: Type that is computed in.
        known: Peaks and sizes that go before the vendor's: any of ``flops``, ``bandwidth``, ``link``, ``network``, ``host``,
            ``host_memory`` and ``disk``.
        nodes: Machines that the ranks are spread over; by default one for each eight ranks.
        utilisation: Part of the peak operations a second that is reached.

    Raises:
        ValueError: it cannot be read, or no such GPU computes in ``dtype``.
    """
    found = re.fullmatch(r"(?:(\d+)\s*[x×*])?\s*(.+)", text.strip())
    if found is None or (ranks := int(found[1] or 1)) < 1:
        raise ValueError(f"--on: expected ranks x memory or GPU, such as 8x40GB or 8xA100-40GB, found {text!r}")
    memory, name = read_bytes(found[2]), _ALIASES.get(found[2].upper(), found[2].upper())
    if memory is None and name not in GPUS:
        raise ValueError(f"--on: expected ranks x memory such as 8x40GB, or a GPU of {', '.join(GPUS)}, found {text!r}")
    like = name if memory is None else _nearest(memory, dtype)
    gpu, flops = GPUS[like], known.get("flops") or peak_flops(like, dtype)
    if flops is None:
        raise ValueError(f"{like} does not compute in {dtype}; give the model another dtype, or say its speed with --flops")
    nodes = nodes or -(-ranks // RANKS_A_NODE)
    if ranks % nodes:
        raise ValueError(f"--nodes: expected a number that divides the {ranks} ranks, found {nodes}")
    return Machine(
        name=text.strip(),
        ranks=ranks,
        nodes=nodes,
        memory=gpu.memory if memory is None else memory,
        flops=flops * utilisation,
        bandwidth=known.get("bandwidth", gpu.bandwidth) * REACHED,
        link=known.get("link", gpu.link) * REACHED,
        network=known.get("network", gpu.network) * REACHED,
        host=known.get("host", gpu.host) * REACHED,
        host_memory=known.get("host_memory", HOST_MEMORY),
        disk=known.get("disk", DISK),
        like=like,
    )


def this_machine() -> str:
    """The GPUs that are here, as :func:`parse_machine` reads them.

    Raises:
        ValueError: none are.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ValueError("this machine has no GPU that torch can use; say which one to plan for, as in --on 8x40GB")
    return f"{count}x{torch.cuda.get_device_properties(0).total_memory / 1e9:.0f}GB"


def gpu_reserve(machine: Machine) -> float:
    """Bytes of a GPU that no tensor gets; an assumption."""
    return CONTEXT + SLACK * machine.memory


def _nearest(memory: float, dtype: Dtype) -> str:
    """The GPU that is nearest to so much memory, of those that compute in ``dtype``; the slowest of equal ones."""
    able = [(name, gpu) for name, gpu in GPUS.items() if peak_flops(name, dtype) is not None]
    return min(able, key=lambda one: (abs(one[1].memory - memory), peak_flops(one[0], dtype)))[0]
