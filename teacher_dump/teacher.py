"""A loaded teacher and what of its answers a recipe keeps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from online.batch import Batch
from online.capture import Capture, check_key
from online.encode import encode
from online.models import LoadedModel, check_length, forward, load_model
from online.planner import Plan, Units, plan
from online.statics import live_statics
from store.codecs import feature_spec
from store.features import Compression, FeatureKey, FeatureSpec
from store.manifest import PassInfo, Provenance
from store.table import RowTable
from teacher_dump.batches import Arrays
from teacher_dump.recipe import DumpRecipe
from teacher_dump.selection import Request
from teacher_dump.ship import shipped_blocks


@dataclass(frozen=True)
class TeacherPass:
    """A teacher on its device, with the smallest set of features from which all requested ones follow."""

    loaded: LoadedModel
    device: torch.device
    requests: tuple[Request, ...]
    plan: Plan
    specs: tuple[FeatureSpec, ...]
    info: PassInfo

    def answer(self, batch: Batch, sources: Sequence[str] = ()) -> Arrays:
        """Run the teacher on ``batch``: what is stored of it, packed, reduced, cast and checked on the device.

        Args:
            sources: where each row comes from, for the message.

        Raises:
            ValueError: a number is not finite as stored (names row and feature), or memory ran out.
        """
        keys = {spec.feature: replace(spec.feature, form="") for spec in self.specs}
        batch = batch.to(self.device)
        try:
            with torch.inference_mode():
                with Capture(self.loaded, keys.values()) as capture:
                    forward(self.loaded, batch)
                values = capture.features(batch)
                return {spec.feature: encode(spec.feature, values[keys[spec.feature]], batch, spec, sources) for spec in self.specs}
        except torch.OutOfMemoryError:
            rows, tokens = batch.mask.shape
            smaller = rows * tokens // 2
            raise ValueError(
                f"out of memory on {self.device} with {rows} rows of {tokens} tokens; lower batch_tokens, as in batch_tokens={smaller}"
            ) from None

    def statics(self) -> dict[str, NDArray[Any]]:
        """The weights that derivations need, in the teacher's type (bfloat16 as uint16), one module at a time."""
        return {name: _numpy(weight) for name, weight in live_statics(self.loaded, self.plan.statics).items()}


def load_pass(recipe: DumpRecipe, requests: tuple[Request, ...], rows: RowTable, made: Provenance) -> TeacherPass:
    """Load the teacher of ``recipe`` and plan what to store of it.

    Raises:
        ValueError: it cannot be loaded, cannot give a feature, or takes shorter rows.
    """
    loaded = load_model(recipe.teacher)
    for request in requests:
        check_key(loaded, replace(request.key, form=""))
    check_length(loaded, rows.longest)
    blocks = shipped_blocks(recipe.ship_layers, loaded.shape.layers)
    what = plan({request.key: request.dtype for request in requests}, loaded.shape, loaded.wiring, Units.average(rows))
    ids = {request.key: request.ids for request in requests}
    specs = []
    for key, dtype in sorted(what.stored.items()):
        keep_bits, compression = _room(key, requests, what)
        specs.append(feature_spec(key, dtype, loaded.shape.width_of(key.site), ids.get(key, ()), keep_bits, compression))
    info = PassInfo(
        teacher=loaded.fingerprint,
        model=str(recipe.teacher.model),
        dtype=recipe.teacher.dtype,
        shape=loaded.shape,
        wiring=loaded.wiring,
        requested=tuple(str(request.key) for request in requests),
        features=tuple(specs),
        statics=(),
        shipped=bool(blocks),
        made=made,
    )
    device = torch.device(recipe.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded.model.to(device)
    return TeacherPass(loaded, device, requests, what, tuple(specs), info)


def _room(key: FeatureKey, requests: Sequence[Request], what: Plan) -> tuple[int | None, Compression]:
    """Mantissa bits and compression of a stored key: as exact as any request that follows from it asks for, compressed if one does."""
    users = [request for request in requests if request.key == key or key in what.derived.get(request.key, ())]
    bits = [request.keep_bits for request in users if request.keep_bits is not None]
    compressed = any(request.compression == "zstd" for request in users)
    return max(bits) if len(bits) == len(users) else None, "zstd" if compressed else "none"


class Origins(Sequence[str]):
    """Where the rows of a batch come from; read from the store only when asked."""

    def __init__(self, rows: RowTable, members: NDArray[np.int64]) -> None:
        self._rows = rows
        self._members = members

    def __len__(self) -> int:
        return len(self._members)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = self._rows.about(int(self._members[index]))
        return f"{row['source']}, record {row['record']}"


def _numpy(weight: Tensor) -> NDArray[Any]:
    weight = weight.detach().cpu().contiguous()
    return weight.view(torch.int16).numpy().view(np.uint16) if weight.dtype == torch.bfloat16 else weight.numpy()
