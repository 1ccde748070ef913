"""The torch half of the codecs: what a batch's features become before they leave the device, and back.

Shapes: B rows, T padded tokens, U packed units (the tokens or rows that are stored, in row order), V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from online.batch import IGNORED, Batch, Drawn, Selected, TopBanded, TopDrawn, TopK, Value, narrowed, take
from online.encoded import Encoded, as_stored
from online.ids import unpack
from online.seeds import seeds
from online.vocabulary import select
from online.word_forms import in_form
from online.word_shares import combines, in_form_of_shares, select_of_shares
from online.words import Share, Words, as_words
from store.codecs import float8, int8
from store.features import ArraySpec, Dtype, FeatureKey, FeatureSpec
from store.forms import word_form

Arrays = Mapping[str, NDArray[np.generic]]
"""Packed arrays of one feature by name, [U, width]; bfloat16 and float8 as their bits in uint16 and uint8."""

_HELD = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}
"""Types that NumPy lacks, and those of their size that carry their bits."""


def encode_on_device(key: FeatureKey, value: Value, batch: Batch, spec: FeatureSpec) -> Encoded:
    """Pack, reduce and cast ``value`` on its device, without waiting for it but where likeliest words are compared with equal ones.

    Args:
        value: The feature in ``batch``; for the forms of word predictions the logits themselves.
    """
    packed = packed_in_form(key, value, batch, spec.ids)
    if spec.codec in _LIMITS:
        exacts = _scaled(cast(Tensor, packed).reshape(-1, spec.arrays[0].width), spec.codec)
    else:
        exacts = {array.name: cast(Tensor, getattr(packed, array.name) if array.name else packed) for array in spec.arrays}
    arrays, largest = {}, {}
    for array in spec.arrays:
        exact = exacts[array.name].reshape(-1, array.numbers)
        stored = as_stored(exact, array)
        if exact.is_floating_point() and array.name != "values":  # a scale is finite exactly where its values are
            largest[array.name] = exact.abs().amax(1)
        arrays[array.name] = stored.view(_HELD.get(stored.dtype, stored.dtype))
    return Encoded(key, spec, arrays, largest)


def encode(key: FeatureKey, value: Value, batch: Batch, spec: FeatureSpec, sources: Sequence[str] = ()) -> dict[str, NDArray[np.generic]]:
    """:func:`encode_on_device` and :meth:`Encoded.finished` in one, for those who wait."""
    encoded = encode_on_device(key, value, batch, spec)
    return encoded.on(tensor.cpu() for tensor in encoded.tensors).finished(batch, sources)


def assemble(key: FeatureKey, spec: FeatureSpec, arrays: Arrays, batch: Batch) -> Value:
    """The feature of ``batch`` from its packed arrays, float32 on the batch's device, zero on padding."""
    tensors = {array.name: _decoded(arrays[array.name], array, batch.mask.device) for array in spec.arrays}
    packed: Value
    if spec.codec == "topk":
        packed = TopK(tensors["ids"], tensors["log_probs"], tensors["log_tail"].squeeze(1))
    elif spec.codec == "topdraw":
        packed = TopDrawn(tensors["ids"], tensors["log_probs"], tensors["log_tail"].squeeze(1))
    elif spec.codec == "topband":
        packed = TopBanded(tensors["ids"], tensors["log_probs"], tensors["bands"])
    elif spec.codec == "draw":
        counts = tensors["counts"]
        packed = Drawn(tensors["ids"], counts, tensors.get("log_weights", counts.new_empty(len(counts), 0)))
    elif spec.codec == "select":
        ids = torch.tensor(spec.ids, dtype=torch.int64, device=batch.mask.device)
        logits = tensors.get("logits", torch.empty(len(tensors["log_sum_exp"]), 0, device=ids.device))
        packed = Selected(ids, logits, tensors["true_logit"].squeeze(1), tensors["log_sum_exp"].squeeze(1))
    elif spec.codec in _LIMITS:
        packed = tensors["values"] * tensors["scale"]
    else:
        (packed,) = tensors.values()
    if key.leftmost and isinstance(packed, Tensor):
        packed = packed.unflatten(1, (key.leftmost, -1))
    return padded_value(key, packed, batch)


def packed_in_form(key: FeatureKey, value: Value, batch: Batch, ids: Sequence[int] = ()) -> Value:
    """The source of ``key`` without padding, word logits and vectors in the form that the key names; anything else as it is.

    Of Words no more than a chunk of logits exists at a time.
    """
    packed = packed_value(key, value, batch)
    if key.kept and isinstance(packed, Tensor):
        return narrowed(packed, key.kept)
    if not key.words or not isinstance(packed, Tensor | Words):
        return packed.logits if isinstance(packed, Words) else packed
    words = as_words(packed) if isinstance(packed, Tensor) else packed
    columns = zip(*(column_U.split(words.parts()) for column_U in _units(key, batch)), strict=True)
    share = words.share if combines(key) else None
    chunks = words.chunks() if share is None else words.shares()
    found = [_form(key, logits_MV, _Units(*chunk), ids, share) for logits_MV, chunk in zip(chunks, columns, strict=True)]
    if isinstance(found[0], Selected):
        return Selected(found[0].ids, *(torch.cat(column) for column in list(zip(*found, strict=True))[1:]))
    return type(found[0])(*(torch.cat(column) for column in zip(*found, strict=True)))


class _Units(NamedTuple):
    """What is known of units beside their logits, [U] each."""

    labels: Tensor
    """The word that each is scored against, IGNORED where there is none."""
    seeds: Tensor
    """Of words that are drawn (online.seeds)."""


def _form(
    key: FeatureKey, logits_MV: Tensor, units: _Units, ids: Sequence[int], share: Share | None
) -> TopK | Drawn | TopDrawn | TopBanded | Selected:
    """What ``key`` keeps of logits [M, V], or [M, v] of a share."""
    form = word_form(key.form)
    if share is not None:
        return select_of_shares(share, logits_MV, ids, units.labels) if form is None else in_form_of_shares(form, share, logits_MV)
    return select(logits_MV, ids, units.labels) if form is None else in_form(form, logits_MV, units.seeds)


_LIMITS = {"int8": int8.LIMIT, "float8": float8.LIMIT}
"""Codecs with a scale for each unit, and the largest number that they keep beside it."""


def _scaled(values_UW: Tensor, codec: str) -> dict[str, Tensor]:
    """Numbers within the codec's range [U, W] and the scale of each unit [U, 1], float32, as store.codecs computes them."""
    limit, values_UW = _LIMITS[codec], values_UW.float()
    # Divided by a number that is no tensor of its own, a GPU would multiply with the reciprocal, which rounds differently.
    scale_U1 = values_UW.abs().amax(1, keepdim=True) / torch.full((), limit, device=values_UW.device)
    if codec == "int8":
        scale_U1 = scale_U1.masked_fill(scale_U1 == float(int8.OVERFLOW), float(int8.BELOW_OVERFLOW))
    within_UW = (values_UW / scale_U1.masked_fill(scale_U1 == 0, 1.0)).clamp(-limit, limit)
    return {"values": within_UW.round() if codec == "int8" else within_UW, "scale": scale_U1}


def packed_value(key: FeatureKey, value: Value, batch: Batch) -> Value:
    """``value`` without padding: [B, T, ...] becomes [U, ...]; values of rows and of labelled tokens and Words are packed already."""
    if key.positions != "all":
        return value
    return _each(value, lambda tensor: tensor.flatten(0, 1).index_select(0, batch.real))


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
    """``value`` with each tensor of a value per token changed; Words have none."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Words):
        return value
    if isinstance(value, Selected):
        return Selected(value.ids, *map(change, value[1:]))
    return type(value)(*map(change, value))


def _units(key: FeatureKey, batch: Batch) -> _Units:
    """Of each unit of ``key``."""
    seeds_of = seeds(batch, key.positions)
    return _Units(_labels(key, batch), seeds_of.flatten()[batch.real] if key.positions == "all" else seeds_of)


def _labels(key: FeatureKey, batch: Batch) -> Tensor:
    """[U] the label of each unit of ``key``, IGNORED where it has none."""
    labels_BT = torch.full_like(batch.input_ids, IGNORED) if batch.token_labels is None else batch.token_labels
    if key.positions == "all":
        return labels_BT.flatten()[batch.real]
    return take(labels_BT[..., None], batch, key.positions).squeeze(-1)


def _decoded(array: NDArray[np.generic], spec: ArraySpec, device: torch.device) -> Tensor:
    if spec.bits is not None:
        return unpack(from_numpy(array, spec.dtype, device, torch.uint8), spec.bits)
    return from_numpy(array, spec.dtype, device, torch.int64 if spec.name == "ids" else torch.float32)


def from_numpy(array: NDArray[np.generic], dtype: Dtype, device: torch.device, wanted: torch.dtype = torch.float32) -> Tensor:
    """A stored array (bfloat16 and float8 as their bits) as ``wanted``, in memory that torch has aligned.

    Matrix products of equal numbers may differ in the last bit when one operand is aligned and the other is not.
    """
    if dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).to(device).view(torch.bfloat16).to(wanted)
    if dtype == "float8_e4m3fn":
        return torch.from_numpy(array).to(device).view(torch.float8_e4m3fn).to(wanted)
    return torch.from_numpy(array).to(device).to(wanted, copy=True)
