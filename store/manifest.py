"""What a store is: format, rows, passes, and fingerprints by content. One JSON file, replaced atomically.

Which (shard, pass) is committed is not repeated here: the commit logs are the only record of it.
"""

from typing import Literal

from store.features import ArraySpec, FeatureSpec
from store.shape import ModelShape, Wiring
from store.strict import Strict

SCHEMA = 1
"""Version of the layout on disk; any change of it bumps this number and gets a line in CHANGELOG.md."""

Json = dict[str, "str | int | float | bool | None | list[Json] | Json"]


class Provenance(Strict):
    """How an output was made."""

    command: tuple[str, ...]
    versions: dict[str, str]
    created: str
    """UTC, ISO 8601."""


class Task(Strict):
    """What the row labels mean."""

    kind: Literal["none", "classification", "regression", "choice", "token"]
    classes: tuple[str, ...] = ()
    choices: int = 0
    """Rows of a group where kind is choice."""


class Part(Strict):
    """One Parquet file of the row table."""

    file: str
    rows: int
    crc32c: int


class RowsInfo(Strict):
    """The frozen inputs of every pass."""

    rows: int
    tokens: int
    slots: int
    slot_tokens: int
    copies: int
    bucket: int
    """Rows are padded to a multiple of this many tokens."""
    objective: Literal["plain", "mlm", "causal"]
    task: Task
    splits: dict[str, int]
    """Rows of each split."""
    parts: tuple[Part, ...]
    token_arrays: tuple[ArraySpec, ...]
    """input_ids always; segments, documents, token_labels where rows have them."""
    slot_crcs: dict[str, tuple[int, ...]]
    """Token array -> crc32c of each slot's file."""
    pad_id: int
    tokenizer: str
    """Fingerprint: vocabulary, special tokens, normalisation, chat template."""
    corpus: str
    """Fingerprint of the text and label columns in order."""
    building: str
    """Fingerprint of the options below."""
    options: Json
    """Row-building options as resolved."""


class Static(Strict):
    """A weight that ships once with a pass (store.shape.STATICS)."""

    name: str
    dtype: Literal["float32", "float16", "bfloat16"]
    shape: tuple[int, ...]
    crc32c: int


class PassInfo(Strict):
    """One teacher's answers over the rows."""

    teacher: str
    """Fingerprint of the weights that were run and the configuration that shapes them."""
    model: str
    """Where the teacher was loaded from, for people."""
    dtype: Literal["float32", "float16", "bfloat16"]
    """The teacher's compute type."""
    shape: ModelShape
    wiring: Wiring
    requested: tuple[str, ...]
    """Keys the dump was asked for; all are stored or derivable."""
    features: tuple[FeatureSpec, ...]
    statics: tuple[Static, ...]
    shipped: bool
    """Whether model/<pass>/ holds blocks to initialise students from (its configuration and tokenizer always ship)."""
    made: Provenance


class Manifest(Strict):
    """The whole of manifest.json."""

    schema_version: int
    rows: RowsInfo
    passes: dict[str, PassInfo]
    made: Provenance
