"""A feature of a batch in the form in which it is stored, before and after it has left its device.

Shapes: B rows, U packed units (the tokens or rows that are stored, in row order).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from online.batch import Batch
from online.ids import pack
from store.features import ArraySpec, FeatureKey, FeatureSpec

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int32": torch.int32,
    "int8": torch.int8,
    "uint16": torch.uint16,
    "uint8": torch.uint8,
}


@dataclass(frozen=True)
class Encoded:
    """A feature of a batch as it will be stored, still on its device; nothing has waited for that."""

    key: FeatureKey
    spec: FeatureSpec
    arrays: dict[str, Tensor]
    """Array name -> [U, width]; bfloat16 and float8 as their bits in int16 and uint8."""
    largest: dict[str, Tensor]
    """Name of each array of real numbers or counts -> [U] its largest magnitude in each unit before it was cast, NaN where there is one."""

    @property
    def tensors(self) -> list[Tensor]:
        """All of it that the host needs."""
        return [*self.arrays.values(), *self.largest.values()]

    def on(self, tensors: Iterable[Tensor]) -> "Encoded":
        """The same with copies of :attr:`tensors` in their place."""
        each = iter(tensors)
        return replace(self, arrays={name: next(each) for name in self.arrays}, largest={name: next(each) for name in self.largest})

    def finished(self, batch: Batch, sources: Sequence[str] = ()) -> dict[str, NDArray[np.generic]]:
        """Array name -> [U, width] in NumPy, once it is on the host; bfloat16 and float8 as their bits in uint16 and uint8.

        Args:
            sources: Where each row of ``batch`` comes from, for the message below.

        Raises:
            ValueError: a number is not finite as stored; names row, feature and the way out.
        """
        arrays = {}
        for array in self.spec.arrays:
            if array.name in self.largest:
                _check_finite(self.key, array, self.largest[array.name], batch, sources)
            host = self.arrays[array.name].numpy()
            arrays[array.name] = host.view(np.uint16) if array.dtype == "bfloat16" else host
        return arrays


def as_stored(exact: Tensor, array: ArraySpec) -> Tensor:
    """Rounded to the bits that are kept, and cast; both keep the order of numbers. Ids are packed where they are stored so."""
    if array.bits is not None:
        return pack(exact, array.bits)
    rounded = exact if array.keep_bits is None else _round_bits(exact, array.keep_bits)
    return rounded.to(_DTYPES[array.dtype])


def _round_bits(values: Tensor, keep_bits: int) -> Tensor:
    """``values`` as float32 with so many mantissa bits, to nearest even, as store.codecs.cast.round_bits does it."""
    values = values.float()
    dropped = 23 - keep_bits
    bits = values.view(torch.int32)
    rounded = (bits + ((1 << (dropped - 1)) - 1) + ((bits >> dropped) & 1)) & (-1 << dropped)
    return torch.where(values.isnan(), values, rounded.view(torch.float32))


def _check_finite(key: FeatureKey, array: ArraySpec, largest_U: Tensor, batch: Batch, sources: Sequence[str]) -> None:
    """A unit is finite as stored exactly where its largest magnitude is."""
    stored_U = as_stored(largest_U, array)
    bad_U = ~stored_U.isfinite() | largest_U.isnan()  # counts are whole numbers once they are stored
    if array.name == "true_logit":  # NaN says that the token has no label
        bad_U &= ~largest_U.isnan()
    if not bad_U.any():
        return
    unit = int(bad_U.nonzero()[0])
    row = int(_row_of_unit(key, batch)[unit])
    source = f" ({sources[row]})" if sources else ""
    where = f"{key} of row {int(batch.rows[row])}{source}"
    if largest_U[unit].isfinite():
        largest = torch.finfo(stored_U.dtype).max
        raise ValueError(
            f"{where}: {float(largest_U[unit]):.4g} does not fit {array.dtype}, whose largest number is {largest:.4g}; "
            f"store it with dtype: bfloat16 or float32"
        )
    raise ValueError(f"{where}: the teacher answers NaN or infinity; run it with dtype: float32, or check its weights")


def _row_of_unit(key: FeatureKey, batch: Batch) -> Tensor:
    """[U] index in the batch of the row that each unit of ``key`` belongs to."""
    rows = torch.arange(len(batch.rows), device=batch.mask.device)
    if key.per_row:
        return rows
    return rows.repeat_interleave(batch.lengths if key.positions == "all" else batch.labelled.sum(1))
