"""Features at rest: the contract between the process that runs a teacher and those that learn from it. Never imports torch."""

from store.building import RowWriter
from store.codecs import CODECS, decode, encode, feature_spec
from store.commits import Commit
from store.errors import CorruptShard, FingerprintMismatch, MissingFeature, StoreBusy, StoreError
from store.features import ArraySpec, FeatureKey, FeatureSpec
from store.manifest import Manifest, PassInfo, Provenance, RowsInfo, Task
from store.reader import Store
from store.rows import Row
from store.shape import ModelShape, Wiring
from store.table import RowTable
from store.writer import StoreWriter

__all__ = [
    "Store",
    "StoreWriter",
    "RowWriter",
    "Row",
    "RowTable",
    "Manifest",
    "RowsInfo",
    "PassInfo",
    "Provenance",
    "Task",
    "Commit",
    "FeatureKey",
    "FeatureSpec",
    "ArraySpec",
    "ModelShape",
    "Wiring",
    "CODECS",
    "feature_spec",
    "encode",
    "decode",
    "StoreError",
    "FingerprintMismatch",
    "MissingFeature",
    "CorruptShard",
    "StoreBusy",
]
