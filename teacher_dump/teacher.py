"""A loaded teacher and what of its answers a recipe keeps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from online.batch import Batch
from online.capture import check_key
from online.encode import encode_on_device
from online.interchange import answered
from online.kept_words import refuse_own_words
from online.models import LoadedModel, check_length, load_model
from online.pending import Pending
from online.planner import Plan, Units, plan
from online.replica import Replica
from online.statics import live_statics
from store.codecs import feature_spec
from store.features import Compression, FeatureKey, FeatureSpec
from store.manifest import PassInfo, Provenance
from store.table import RowTable
from teacher_dump.batches import Arrays
from teacher_dump.out_of_memory import out_of_memory
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
    alike: bool
    """Whether all ranks of a replica must answer the same batches: those of a model that is split by tensor parallelism."""
    batch_tokens: int = 0
    """Padded tokens of a batch; 0 until :meth:`batched` has said it."""

    @property
    def runs(self) -> int:
        """Forward passes over each batch."""
        return 1 if self.info.intervention is None else 2

    def batched(self, tokens: int) -> "TeacherPass":
        """The same with batches of so many padded tokens."""
        return replace(self, batch_tokens=tokens, info=self.info.model_copy(update={"batch_tokens": tokens}))

    def start(self, batch: Batch, sources: Sequence[str] = ()) -> Pending:
        """Run the teacher on ``batch`` and start to copy what is stored of it, packed, reduced and cast on the device, to the host.

        Args:
            batch: On the host.
            sources: Where each row comes from, for the message about a number that is not finite.

        Raises:
            OutOfMemory: the batch is too large.
        """
        keys = {spec.feature: replace(spec.feature, form="") for spec in self.specs}
        there = batch.to(self.device)
        with out_of_memory(self.device, *batch.mask.shape), torch.no_grad():
            values = answered(self.loaded, there, keys.values(), self.info.intervention)
            encoded = [encode_on_device(spec.feature, values[keys[spec.feature]], there, spec) for spec in self.specs]
            return Pending(encoded, batch, sources)

    def answer(self, batch: Batch, sources: Sequence[str] = ()) -> Arrays:
        """:meth:`start`, and wait for it.

        Raises:
            ValueError: a number is not finite as stored (names row and feature).
            OutOfMemory: the batch is too large.
        """
        return self.start(batch, sources).arrays()

    def statics(self) -> dict[str, NDArray[Any]]:
        """The weights that derivations need, in the teacher's type (bfloat16 as uint16), one module at a time."""
        return {name: _numpy(weight) for name, weight in live_statics(self.loaded, self.plan.statics).items()}


def load_pass(recipe: DumpRecipe, requests: tuple[Request, ...], rows: RowTable, made: Provenance, replica: Replica) -> TeacherPass:
    """Load the teacher of ``recipe``, together with the other ranks of the ``replica``, and plan what to store of it.

    Raises:
        ValueError: it cannot be loaded, cannot give a feature, or takes shorter rows.
    """
    device = replica.device(recipe.device)
    loaded = load_model(recipe.teacher, sharding=recipe.sharding, device=device)
    for request in requests:
        check_key(loaded, replace(request.key, form=""))
    refuse_own_words(loaded.model, (request.key for request in requests))
    check_length(loaded, rows.longest)
    return pass_of(recipe, requests, loaded, loaded.fingerprint, device, Units.average(rows), made)


def pass_of(
    recipe: DumpRecipe,
    requests: tuple[Request, ...],
    loaded: LoadedModel,
    fingerprint: str,
    device: torch.device,
    units: Units,
    made: Provenance,
) -> TeacherPass:
    """What ``recipe`` keeps of a teacher that is there, or of one without weights.

    Args:
        fingerprint: Of its weights.
        units: Values that a row has on average; they decide what is stored and what is derived.

    Raises:
        ValueError: a feature can be neither stored nor derived.
    """
    blocks = shipped_blocks(recipe.ship_layers, loaded.shape.layers)
    what = plan({request.key: request.dtype for request in requests}, loaded.shape, loaded.wiring, units)
    ids = {request.key: request.ids for request in requests}
    specs = []
    for key, dtype in sorted(what.stored.items()):
        keep_bits, compression = _room(key, requests, what)
        specs.append(feature_spec(key, dtype, loaded.shape.unit_width(key), ids.get(key, ()), keep_bits, compression))
    info = PassInfo(
        teacher=fingerprint,
        model=str(recipe.teacher.model),
        dtype=recipe.teacher.dtype,
        shape=loaded.shape,
        wiring=loaded.wiring,
        requested=tuple(str(request.key) for request in requests),
        features=tuple(specs),
        statics=(),
        shipped=bool(blocks),
        made=made,
        intervention=recipe.intervention,
    )
    return TeacherPass(loaded, device, requests, what, tuple(specs), info, alike=recipe.sharding.kind == "tp")


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
