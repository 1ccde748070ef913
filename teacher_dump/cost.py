"""The bytes that a dump writes, counted before it writes them."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from online.models import LoadedModel
from store import hierarchy, layout
from store.blocks import compress
from store.features import ArraySpec, FeatureKey
from store.manifest import Manifest, manifest_bytes
from store.reader import Store
from store.shards import CRC_BYTES, Shard
from store.statics import describe_statics
from store.table import Ints
from teacher_dump.batches import Arrays
from teacher_dump.recipe import DumpRecipe
from teacher_dump.ship import write_folder
from teacher_dump.teacher import TeacherPass

SAMPLED_CHUNKS = 48
"""Full chunks of an array that are compressed to know their mean length."""
_CRC_DIGITS = 4_000_000_000
"""A checksum as long as most of them are when written out."""


@dataclass(frozen=True)
class Cost:
    """Sizes of files in bytes: checksums, shard indexes and unfilled chunk ends included, blocks of the file system not."""

    rows: int
    """Row table and token arrays."""
    features: dict[FeatureKey, Ints]
    """[slots] bytes of each stored feature."""
    statics: int
    """Weights that derivations need."""
    model: int
    """Configuration, tokenizer and the blocks that ship."""
    records: int
    """Zarr metadata, manifest and commit log."""

    @property
    def added(self) -> int:
        """What the pass adds to rows that are there."""
        return self.shards() + self.statics + self.model + self.records

    @property
    def total(self) -> int:
        return self.rows + self.added

    def shards(self, chosen: list[int] | None = None) -> int:
        """Bytes of the features of the ``chosen`` shards (all by default)."""
        per_slot = sum(self.features.values())
        assert isinstance(per_slot, np.ndarray)
        return int(per_slot.sum() if chosen is None else per_slot[chosen].sum())


def cost_of(
    store: Store,
    recipe: DumpRecipe,
    teacher: TeacherPass,
    weights: Mapping[str, NDArray[Any]],
    shipped: Mapping[str, Tensor],
    answered: Sequence[Arrays],
) -> Cost:
    """What the pass of ``recipe`` takes over the rows of ``store``, which may be a scratch copy of them.

    Args:
        weights: What derivations need.
        shipped: What students start from.
        answered: Answers to some batches; how well they compress says how large compressed arrays will be.
    """
    features = {}
    for spec in teacher.specs:
        files = [_file_bytes(store, recipe.pass_name, spec.feature, array, answered) for array in spec.arrays]
        features[spec.feature] = np.sum(files, axis=0)
    return Cost(
        rows=folder_bytes(store.path / "rows") + folder_bytes(store.path / "tokens"),
        features=features,
        statics=sum(weight.nbytes + 4 for weight in weights.values()),
        model=_model_bytes(recipe, teacher.loaded, shipped),
        records=_record_bytes(store.manifest, recipe.pass_name, teacher, weights, features),
    )


def _file_bytes(store: Store, pass_name: str, key: FeatureKey, array: ArraySpec, answered: Sequence[Arrays]) -> Ints:
    """[slots] bytes of each file of an array: as committed, as they follow from what is in the slot, or as estimated."""
    slots, name = range(store.manifest.rows.slots), layout.array_name(key, array.name)
    sizes = np.array([store.rows.shard(array, key.positions, slot).size for slot in slots], np.int64)
    if array.compression == "none":
        return sizes
    known = {slot: commit.files[name].size for slot, commit in store.committed(pass_name).items() if name in commit.files}
    if answered and len(known) < len(slots):
        values = np.concatenate([arrays[key][array.name] for arrays in answered])
        chunks = Chunks(values, array, store.manifest.rows.chunk(array, key.positions))
        sizes = np.array([chunks.file_bytes(store.rows.shard(array, key.positions, slot)) for slot in slots], np.int64)
    sizes[list(known)] = list(known.values())
    return sizes


class Chunks:
    """How long the compressed chunks of an array are, from a sample of its values [n, W]."""

    def __init__(self, values_nW: NDArray[Any], array: ArraySpec, chunk: int) -> None:
        self._values, self._array, self._chunk = values_nW, array, chunk
        self._known: dict[int, float] = {}

    def file_bytes(self, shard: Shard) -> int:
        """Bytes of the file of one slot."""
        whole, rest = divmod(shard.units, self._chunk)
        return round(whole * self._bytes(self._chunk) + self._bytes(rest)) + shard.chunks * CRC_BYTES + shard.index_bytes

    def _bytes(self, units: int) -> float:
        """Mean length of a chunk with so many units and fill values after them; in proportion where the sample has fewer."""
        if not units or not len(self._values):
            return 0.0
        if units not in self._known:
            there = min(units, len(self._values))
            most = SAMPLED_CHUNKS if there == self._chunk else 4
            starts = np.unique(np.linspace(0, len(self._values) // there - 1, most).astype(np.int64)) * there
            shard = Shard(self._array, self._chunk, there, self._chunk)
            lengths = [len(compress(chunk)) for start in starts for chunk in shard.split(self._values[start : start + there])]
            self._known[units] = float(np.mean(lengths)) * units / there
        return self._known[units]


def folder_bytes(folder: Path) -> int:
    """Sizes of all files below ``folder`` but Zarr metadata; 0 where it is absent."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name != "zarr.json")


def _record_bytes(
    manifest: Manifest, name: str, teacher: TeacherPass, weights: Mapping[str, NDArray[Any]], features: Mapping[FeatureKey, Ints]
) -> int:
    info = teacher.info.model_copy(update={"statics": describe_statics(weights)})
    manifest = manifest.model_copy(update={"passes": {**manifest.passes, name: info}})
    nodes = sum(len(json.dumps(node, indent=1)) for node in hierarchy.nodes(manifest).values())
    files = {layout.array_name(spec.feature, array.name): [10**7, _CRC_DIGITS] for spec in teacher.specs for array in spec.arrays}
    line = len(json.dumps({"pass": name, "shard": manifest.rows.slots - 1, "files": files})) + 10
    return nodes + len(manifest_bytes(manifest)) + manifest.rows.slots * line


def _model_bytes(recipe: DumpRecipe, loaded: LoadedModel, shipped: Mapping[str, Tensor]) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        write_folder(Path(scratch) / "model", loaded, recipe, {}, {})
        small = folder_bytes(Path(scratch))
    tensors = {weight.data_ptr(): weight.nbytes for weight in shipped.values()}
    return small + sum(tensors.values()) + 128 * len(tensors)  # a tensor's entry in the header of a safetensors file
