"""The torch half of the codecs: what a batch's features become before they leave the device, and back.

Shapes: B rows, T padded tokens, U packed units (the tokens or rows that are stored, in row order), V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from online.batch import IGNORED, Batch, Selected, TopK, Value, take
from online.vocabulary import select, top_k
from store.features import ArraySpec, Dtype, FeatureKey, FeatureSpec

Arrays = Mapping[str, NDArray[np.generic]]
"""Packed arrays of one feature by name, [U, width]; bfloat16 as its bits in uint16."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int32": torch.int32, "uint16": torch.uint16}


def encode(key: FeatureKey, value: Value, batch: Batch, spec: FeatureSpec, sources: Sequence[str] = ()) -> dict[str, NDArray[np.generic]]:
    """Pack, reduce and cast ``value`` on its device; array name -> [U, width], bfloat16 as its bits in uint16.

    Args:
        value: The feature in ``batch``; for the forms ``topK`` and ``select`` the logits themselves.
        sources: Where each row of ``batch`` comes from, for the message below.

    Raises:
        ValueError: a number is not finite as stored; names row, feature and the way out.
    """
    packed = reduced(key, packed_value(key, value, batch), batch, spec.ids)
    arrays = {}
    for array in spec.arrays:
        exact = cast(Tensor, getattr(packed, array.name)) if array.name else cast(Tensor, packed)
        exact = exact.reshape(len(exact), array.width)
        stored = exact.to(_DTYPES[array.dtype])
        if stored.is_floating_point():
            _check_finite(key, array, exact, stored, batch, sources)
        host = (stored.view(torch.int16) if stored.dtype == torch.bfloat16 else stored).cpu().numpy()
        arrays[array.name] = host.view(np.uint16) if stored.dtype == torch.bfloat16 else host
    return arrays


def assemble(key: FeatureKey, spec: FeatureSpec, arrays: Arrays, batch: Batch) -> Value:
    """The feature of ``batch`` from its packed arrays, float32 on the batch's device, zero on padding."""
    tensors = {array.name: _decoded(arrays[array.name], array, batch.mask.device) for array in spec.arrays}
    packed: Value
    if spec.codec == "topk":
        packed = TopK(tensors["ids"], tensors["log_probs"], tensors["log_tail"].squeeze(1))
    elif spec.codec == "select":
        ids = torch.tensor(spec.ids, dtype=torch.int64, device=batch.mask.device)
        logits = tensors.get("logits", torch.empty(len(tensors["log_sum_exp"]), 0, device=ids.device))
        packed = Selected(ids, logits, tensors["true_logit"].squeeze(1), tensors["log_sum_exp"].squeeze(1))
    else:
        (packed,) = tensors.values()
    return padded_value(key, packed, batch)


def reduced(key: FeatureKey, packed: Value, batch: Batch, ids: Sequence[int] = ()) -> Value:
    """Packed logits [U, V] in the form that ``key`` names; anything else as it is."""
    if not key.form or not isinstance(packed, Tensor):
        return packed
    if key.form == "select":
        return select(packed, ids, _labels(key, batch))
    return top_k(packed, int(key.form.removeprefix("top")))


def packed_value(key: FeatureKey, value: Value, batch: Batch) -> Value:
    """``value`` without padding: [B, T, ...] becomes [U, ...]; values of rows and of labelled tokens are packed already."""
    if key.positions != "all":
        return value
    return _each(value, lambda tensor: tensor[batch.mask])


def padded_value(key: FeatureKey, value: Value, batch: Batch) -> Value:
    """The reverse of :func:`packed_value`, with zeros on padding."""
    if key.positions != "all":
        return value

    def padded(packed: Tensor) -> Tensor:
        out = packed.new_zeros(*batch.mask.shape, *packed.shape[1:])
        out[batch.mask] = packed
        return out

    return _each(value, padded)


def _each(value: Value, change: Callable[[Tensor], Tensor]) -> Value:
    """``value`` with each tensor of a value per token changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, TopK):
        return TopK(*map(change, value))
    return Selected(value.ids, *map(change, value[1:]))


def _labels(key: FeatureKey, batch: Batch) -> Tensor:
    """[U] the label of each unit of ``key``, IGNORED where it has none."""
    labels_BT = torch.full_like(batch.input_ids, IGNORED) if batch.token_labels is None else batch.token_labels
    if key.positions == "all":
        return labels_BT[batch.mask]
    return take(labels_BT[..., None], batch, key.positions).squeeze(-1)


def _decoded(array: NDArray[np.generic], spec: ArraySpec, device: torch.device) -> Tensor:
    return from_numpy(array, spec.dtype, device, torch.int64 if spec.name == "ids" else torch.float32)


def from_numpy(array: NDArray[np.generic], dtype: Dtype, device: torch.device, wanted: torch.dtype = torch.float32) -> Tensor:
    """A stored array (bfloat16 as its bits in uint16) as ``wanted``, in memory that torch has aligned.

    Matrix products of equal numbers may differ in the last bit when one operand is aligned and the other is not.
    """
    if dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).to(device).view(torch.bfloat16).to(wanted)
    return torch.from_numpy(array).to(device).to(wanted, copy=True)


def _check_finite(key: FeatureKey, array: ArraySpec, exact: Tensor, stored: Tensor, batch: Batch, sources: Sequence[str]) -> None:
    bad = ~stored.isfinite()
    if array.name == "true_logit":  # NaN says that the token has no label
        bad &= ~stored.isnan()
    if not bad.any():
        return
    unit = int(bad.any(1).nonzero()[0])
    row = int(_row_of_unit(key, batch)[unit])
    source = f" ({sources[row]})" if sources else ""
    where = f"{key} of row {int(batch.rows[row])}{source}"
    if exact[unit].isfinite().all():
        largest = torch.finfo(stored.dtype).max
        raise ValueError(
            f"{where}: {float(exact[unit].abs().max()):.4g} does not fit {array.dtype}, whose largest number is {largest:.4g}; "
            f"store it with dtype: bfloat16 or float32"
        )
    raise ValueError(f"{where}: the teacher answers NaN or infinity; run it with dtype: float32, or check its weights")


def _row_of_unit(key: FeatureKey, batch: Batch) -> Tensor:
    """[U] index in the batch of the row that each unit of ``key`` belongs to."""
    rows = torch.arange(len(batch.rows), device=batch.mask.device)
    if key.per_row:
        return rows
    return rows.repeat_interleave(batch.lengths if key.positions == "all" else batch.labelled.sum(1))
