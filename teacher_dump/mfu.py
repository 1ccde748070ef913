"""How much of a GPU's arithmetic a pass uses: model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).

Operations are those of the forward pass over rows with their padding; what the dump reduces and encodes beside it does not count.
"""

from dataclasses import dataclass

import torch

from online.flops import ForwardFlops, forward_flops, peak_flops
from store.table import Ints, RowTable
from teacher_dump.batches import padded_lengths
from teacher_dump.teacher import TeacherPass


@dataclass(frozen=True)
class Arithmetic:
    """Floating-point operations of a teacher's batches."""

    flops: ForwardFlops
    positions: frozenset[str]
    """Tokens at which the language-model head is asked."""
    runs: int
    """Forward passes over a batch."""
    peak: float
    """Operations a second of the devices that answer a batch together."""

    def operations(self, rows: RowTable, members: Ints) -> int:
        """Of the batch of the rows ``members``."""
        lengths, labelled = padded_lengths(rows, members), int(rows.at(members).labelled.sum())
        units = {"all": int(lengths.sum()), "mean": int(lengths.sum()), "masked": labelled, "labels": labelled}
        return self.runs * self.flops.rows(lengths.tolist(), sum(units.get(positions, len(members)) for positions in self.positions))


def arithmetic(teacher: TeacherPass, together: int = 1) -> Arithmetic | None:
    """How to count for ``teacher``; None without a GPU of known speed, and for custom architectures, whose work is not known.

    Args:
        together: Ranks that answer each batch together (tensor parallelism).
    """
    loaded, device = teacher.loaded, teacher.device
    if device.type != "cuda" or loaded.custom is not None:
        return None
    if teacher.info.dtype == "float32" and torch.get_float32_matmul_precision() != "highest":
        return None  # TF32: another peak
    peak = peak_flops(torch.cuda.get_device_name(device), teacher.info.dtype)
    return None if peak is None else counting(teacher, peak * together)


def counting(teacher: TeacherPass, peak: float) -> Arithmetic:
    """How to count for ``teacher`` on devices that do ``peak`` operations a second."""
    positions = {spec.feature.positions for spec in teacher.specs if spec.feature.site == "lm_logits"}
    return Arithmetic(forward_flops(teacher.loaded.model.config, teacher.loaded.shape.head), frozenset(positions), teacher.runs, peak)
