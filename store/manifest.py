"""What a store is: format, rows, passes, and fingerprints by content. One JSON file, replaced atomically.

Which (shard, pass) is committed is not repeated here: the commit logs are the only record of it.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue

from store import layout
from store.errors import StoreError
from store.features import ArraySpec, FeatureSpec
from store.publish import crc32c
from store.schemas import READABLE, upgrade
from store.shape import ModelShape, Wiring
from store.shards import CHUNK
from store.strict import Strict, parse

SCHEMA = 2
"""Version of the layout on disk; any change of it gets a new number and a line in CHANGELOG.md. Older ones are read (store.schemas)."""

Json = dict[str, JsonValue]

_CHECKSUM = b' "crc32c": '


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


class Origin(Strict):
    """One build of rows: where the slots came from."""

    corpus: str
    """Fingerprint of the text and label columns in order."""
    options: Json
    """Row-building options as resolved."""
    slots: int = Field(ge=1)
    """How many slots it made; those of the first origin come first."""


class Filled(Strict):
    """What each slot holds, [slots] each."""

    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    labelled: tuple[int, ...]
    """Tokens that are scored against a label."""


class RowsInfo(Strict):
    """The frozen inputs of every pass."""

    rows: int = Field(ge=1)
    tokens: int = Field(ge=1)
    slots: int = Field(ge=1)
    slot_tokens: int = Field(ge=CHUNK, multiple_of=CHUNK)
    chunk_tokens: int = Field(ge=CHUNK, multiple_of=CHUNK)
    """Tokens of an inner chunk of raw arrays that have a value for every token; all other chunks have 128 units."""
    filled: Filled
    copies: int = Field(ge=1)
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
    """Token array, or array of the row table (store.rows.ROW_ARRAYS) -> crc32c of each slot's file (store.shards.Seal)."""
    pad_id: int
    tokenizer: str
    """Fingerprint: vocabulary, special tokens, normalisation, chat template."""
    building: str
    """Fingerprint of the options that rows of all origins share."""
    origins: tuple[Origin, ...] = Field(min_length=1)

    def chunk(self, array: ArraySpec, positions: str) -> int:
        """Units of an inner chunk of an array with values for ``positions``."""
        return self.chunk_tokens if positions == "all" and array.compression == "none" else CHUNK

    @property
    def corpus(self) -> str:
        """Fingerprint of all texts: that of the one origin, or of their fingerprints in order."""
        prints = [origin.corpus for origin in self.origins]
        return prints[0] if len(prints) == 1 else hashlib.sha256("\n".join(prints).encode()).hexdigest()


class Static(Strict):
    """A weight that ships once with a pass (store.shape.STATICS)."""

    name: str
    dtype: Literal["float32", "float16", "bfloat16"]
    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
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


def read_manifest(path: Path) -> Manifest:
    """The manifest of the store in folder ``path``, checked.

    Raises:
        StoreError: there is no store, its rows are unfinished, or it is of another schema or makes no sense.
    """
    file = layout.manifest(path)
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if layout.building(path).exists():
            raise StoreError(f"the rows of {path} are unfinished; start its dump again") from None
        found = "something else" if path.exists() else "nothing"
        raise StoreError(f"expected a store at {path}, found {found}; make one with teacher-dump") from None
    except OSError as error:
        raise StoreError(f"cannot read {file}: {error.strerror}") from None
    try:
        tree = json.loads(data)
    except ValueError as error:
        raise StoreError(f"{file} is damaged ({error}); put back a copy of it, or remove the folder and start the dump again") from None
    version = tree.get("schema_version") if isinstance(tree, dict) else None
    if version not in READABLE:
        raise StoreError(f"{file}: expected schema version 1 to {SCHEMA}, found {version}; read it with a newer release, or dump again")
    body, _, last = data.rpartition(_CHECKSUM)
    if last != b"%d\n}\n" % crc32c(body):
        raise StoreError(f"{file} fails its checksum: it was damaged or edited; put back a copy of it, or remove the folder and dump again")
    del tree["crc32c"]
    try:
        manifest = parse(Manifest, upgrade(path, tree), str(file))
        _check(manifest)
    except ValueError as error:
        raise StoreError(str(error)) from None
    return manifest


def manifest_bytes(manifest: Manifest) -> bytes:
    """The file's content: the manifest as JSON, and in its last line the crc32c of all bytes before that line."""
    body = manifest.model_dump_json(indent=1).encode().removesuffix(b"\n}") + b",\n"
    return b"%s%s%d\n}\n" % (body, _CHECKSUM, crc32c(body))


def _check(manifest: Manifest) -> None:
    """What the types of the manifest do not say."""
    rows = manifest.rows
    filled = rows.filled
    sums = sum(part.rows for part in rows.parts), sum(rows.splits.values()), sum(filled.rows)
    if set(sums) != {rows.rows} or sum(filled.tokens) != rows.tokens or sum(origin.slots for origin in rows.origins) != rows.slots:
        raise ValueError("manifest: the numbers of rows, tokens and slots contradict each other")
    if {len(filled.rows), len(filled.tokens), len(filled.labelled)} != {rows.slots}:
        raise ValueError(f"manifest: expected what is in each of {rows.slots} slots")
    full = zip(filled.rows, filled.tokens, filled.labelled, strict=True)
    if not all(1 <= of_rows <= tokens <= rows.slot_tokens and 0 <= labelled <= tokens for of_rows, tokens, labelled in full):
        raise ValueError(f"manifest: expected slots of 1 to {rows.slot_tokens} tokens, with at least one in each row")
    if rows.slot_tokens % rows.chunk_tokens:
        raise ValueError(f"manifest: a slot of {rows.slot_tokens} tokens is not cut into chunks of {rows.chunk_tokens}")
    for array in rows.token_arrays:
        layout.safe(array.name)
        if array.width != 1 or len(rows.slot_crcs.get(array.name, ())) != rows.slots:
            raise ValueError(f"manifest: token array {array.name} needs a checksum for each of {rows.slots} slots")
    for name, info in manifest.passes.items():
        layout.pass_name(name)
        if len({feature.feature for feature in info.features}) < len(info.features):
            raise ValueError(f"manifest: pass {name} holds a feature twice")
        for feature in info.features:
            if feature.feature.pass_name:
                raise ValueError(f"manifest: pass {name}: expected a key without a pass, found {feature.key}")
            for array in feature.arrays:
                layout.array_name(feature.feature, array.name)
        for static in info.statics:
            layout.safe(static.name)
