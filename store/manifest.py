"""What a store is: format, rows, passes, and fingerprints by content. One JSON file, replaced atomically.

Which (shard, pass) is committed is not repeated here: the commit logs are the only record of it.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue

from store import layout
from store.errors import StoreError
from store.features import ITEM_BYTES, ArraySpec, FeatureSpec
from store.intervention import Intervention
from store.parts import PART_ROWS
from store.plain import read_plain, why
from store.publish import crc32c
from store.remote import local
from store.rows import ROW_ARRAYS, TOKEN_ARRAYS
from store.schemas import READABLE, upgrade
from store.shape import ModelShape, Wiring
from store.shards import CHUNK, MOST_SLOT_TOKENS
from store.strict import Many, Strict, brief, load_json, parse

SCHEMA = 6
"""Version of the layout on disk; any change of it gets a new number and a line in CHANGELOG.md. Older ones are read (store.schemas)."""

Json = dict[str, JsonValue]

Crc32c = Annotated[int, Field(ge=0, lt=2**32)]

MOST_JOB = 1 << 16
"""A command in the marker of an unfinished store may be so long."""
MOST_BYTES = 1 << 26
"""A manifest may be so long. Of the 64 MiB one of 100,000 slots needs 15."""

MOST_CHUNK_BYTES = 1 << 29
"""A compressed chunk may hold so much: what a small file makes a reader allocate."""

MOST_STATIC = 1 << 36
"""Numbers of one weight."""

_CHECKSUM = b' "crc32c": '


class Provenance(Strict):
    """How an output was made."""

    command: Many[str]
    versions: dict[str, str]
    created: str
    """UTC, ISO 8601."""


class Task(Strict):
    """What the row labels mean."""

    kind: Literal["none", "classification", "regression", "choice", "token"]
    classes: Many[str] = ()
    choices: int = 0
    """Rows of a group where kind is choice."""


class Part(Strict):
    """One Parquet file of the row table."""

    file: str
    rows: int = Field(ge=1)
    crc32c: Crc32c


class Origin(Strict):
    """One build of rows: where the slots came from."""

    corpus: str
    """Fingerprint of the text and label columns in order."""
    options: Json
    """Row-building options as resolved."""
    slots: int = Field(ge=1)
    """How many slots it made; those of the first origin come first."""
    taken: str | None = None
    """Which of its rows are here, such as ``split dev``; all of them where nothing is said."""


class Filled(Strict):
    """What each slot holds, [slots] each."""

    rows: Many[int]
    tokens: Many[int]
    labelled: Many[int]
    """Tokens that are scored against a label."""


class RowsInfo(Strict):
    """The frozen inputs of every pass."""

    rows: int = Field(ge=1)
    tokens: int = Field(ge=1)
    slots: int = Field(ge=1)
    slot_tokens: int = Field(ge=CHUNK, le=MOST_SLOT_TOKENS, multiple_of=CHUNK)
    chunk_tokens: int = Field(ge=CHUNK, multiple_of=CHUNK)
    """Tokens of an inner chunk of raw arrays that have a value for every token; all other chunks have 128 units."""
    filled: Filled
    copies: int = Field(ge=1, lt=2**31)
    bucket: int = Field(ge=1, le=MOST_SLOT_TOKENS)
    """Rows are padded to a multiple of this many tokens."""
    objective: Literal["plain", "mlm", "causal"]
    task: Task
    domains: Many[str] = ()
    """Names of all domains that rows may be of; none where rows have no domain."""
    splits: dict[str, Annotated[int, Field(ge=0)]]
    """Rows of each split."""
    parts: Many[Part]
    token_arrays: Many[ArraySpec]
    """input_ids always; segments, documents, token_labels, phrases, interchange where rows have them."""
    slot_crcs: dict[str, Many[Crc32c]]
    """Token array, or array of the row table (store.rows.ROW_ARRAYS) -> crc32c of each slot's file (store.shards.Seal)."""
    pad_id: int = Field(ge=0, lt=2**31)
    tokenizer: str
    """Fingerprint: vocabulary, special tokens, normalisation, chat template."""
    building: str
    """Fingerprint of the options that rows of all origins share."""
    origins: Many[Origin] = Field(min_length=1)

    @property
    def row_arrays(self) -> dict[str, ArraySpec]:
        """The arrays of the row table that there are; none in schema 1."""
        return {name: array for name, array in ROW_ARRAYS.items() if name in self.slot_crcs}

    @property
    def paired(self) -> bool:
        """Whether rows stand in pairs that know what each takes of the other (store.pairs)."""
        return "interchange" in self.slot_crcs

    @property
    def verbalisers(self) -> tuple[int, ...]:
        """Vocabulary id of the word that stands for each class, where rows are clozes; none elsewhere."""
        found = self.origins[0].options.get("verbalisers")
        return tuple(int(number) for number in found if isinstance(number, int)) if isinstance(found, list) else ()

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

    name: str = Field(max_length=200)
    dtype: Literal["float32", "float16", "bfloat16"]
    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1, max_length=8)
    crc32c: Crc32c


IMPORTED = "unknown (imported)"
"""Fingerprint of a teacher whose answers another program kept. Nothing of it ships but its tokenizer, where one was given."""


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
    requested: Many[str]
    """Keys the dump was asked for; all are stored or derivable."""
    features: Many[FeatureSpec]
    statics: Many[Static]
    shipped: bool
    """Whether model/<pass>/ holds blocks to initialise students from (its configuration and tokenizer always ship)."""
    made: Provenance
    batch_tokens: int | None = Field(default=None, ge=1)
    """Padded tokens of a teacher batch, as the first start found or was told; a commit says where a shard was answered with others.
    None where that is not known: imported, or written by schema 1 or 2."""
    intervention: Intervention | None = None
    """What was written into the teacher while it answered; None where nothing was."""

    @property
    def imported(self) -> bool:
        """Whether another program ran the teacher."""
        return self.teacher == IMPORTED


class Manifest(Strict):
    """The whole of manifest.json."""

    schema_version: int
    rows: RowsInfo
    passes: dict[str, PassInfo]
    made: Provenance
    """By the command that last changed it as a whole: built, added to, merged, copied or dropped from."""
    history: Many[Provenance] = ()
    """The commands before that one, of all stores that it was made from."""

    def changed(self, made: Provenance, rows: RowsInfo, passes: dict[str, PassInfo]) -> "Manifest":
        """The manifest after a command that changed the store as a whole."""
        return Manifest(schema_version=SCHEMA, rows=rows, passes=passes, made=made, history=(*self.history, self.made))


def read_manifest(path: Path) -> Manifest:
    """The manifest of the store in folder ``path``, checked.

    Raises:
        StoreError: there is no store, its rows are unfinished, or it is of another schema or makes no sense.
    """
    file = layout.manifest(local(path))
    try:
        data = read_plain(file, MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        if layout.building(path).exists():
            mend = f"run `{job}` again" if (job := begun(path)) else "start its dump again"
            raise StoreError(f"the rows of {path} are unfinished; {mend}") from None
        found = "something else" if path.exists() else "nothing"
        raise StoreError(f"expected a store at {path}, found {found}; make one with teacher-dump") from None
    except OSError as error:
        raise StoreError(f"cannot read {file}: {why(error)}; put back a copy of it, or mend its rights") from None
    try:
        tree = load_json(data)
    except ValueError as error:
        raise StoreError(f"{file} is damaged ({error}); put back a copy of it, or remove the folder and start the dump again") from None
    version = tree.get("schema_version") if isinstance(tree, dict) else None
    if type(version) is not int or version not in READABLE:
        found = "none" if version is None else brief(version)
        raise StoreError(f"{file}: expected schema version 1 to {SCHEMA}, found {found}; read it with a newer release, or dump again")
    body, _, last = data.rpartition(_CHECKSUM)
    if last != b"%d\n}\n" % crc32c(body):
        raise StoreError(f"{file} fails its checksum: it was damaged or edited; put back a copy of it, or remove the folder and dump again")
    del tree["crc32c"]
    try:
        manifest = parse(Manifest, upgrade(path, tree), str(file))
        _check(manifest)
    except ValueError as error:
        raise StoreError(f"{error}\n{file} makes no sense: put back a copy of it, or remove the folder and dump again") from None
    return manifest


def begun(path: Path) -> str:
    """The command that makes the unfinished store at ``path``; empty where that is a dump."""
    try:
        return read_plain(layout.building(path), MOST_JOB).decode("utf-8", "replace")
    except OSError:
        return ""


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
    if rows.paired and any(count % 2 for count in filled.rows):
        raise ValueError("manifest: expected an even number of rows in each slot, for they stand in pairs")
    if rows.slot_tokens % rows.chunk_tokens:
        raise ValueError(f"manifest: a slot of {rows.slot_tokens} tokens is not cut into chunks of {rows.chunk_tokens}")
    if [part.file for part in rows.parts] != [layout.rows_part_name(number) for number in range(len(rows.parts))]:
        raise ValueError(f"manifest: expected row parts {layout.rows_part_name(0)} and so on, found {brief([p.file for p in rows.parts])}")
    if max(part.rows for part in rows.parts) > PART_ROWS + rows.slot_tokens:
        raise ValueError(f"manifest: expected row parts of at most {PART_ROWS + rows.slot_tokens:,} rows")
    _check_distinct("rows", [array.name for array in rows.token_arrays])
    for array in rows.token_arrays:
        layout.safe(array.name)
        if array != TOKEN_ARRAYS.get(array.name) or len(rows.slot_crcs.get(array.name, ())) != rows.slots:
            raise ValueError(f"manifest: token array {array.name} needs its type, width 1 and a checksum for each of {rows.slots} slots")
    others = rows.slot_crcs.keys() - {array.name for array in rows.token_arrays}
    needed = {"numbers", "label", *(["domain"] if rows.domains else []), *(["draw"] if rows.paired else [])}
    schema_1 = not (others or rows.domains or rows.paired)
    if not (schema_1 or others == needed) or any(len(crcs) != rows.slots for crcs in rows.slot_crcs.values()):
        raise ValueError(f"manifest: expected a checksum for each of {rows.slots} slots")
    _check_distinct("rows", rows.domains)
    found = rows.verbalisers
    if found and (len(set(found)) != len(rows.task.classes) or not all(0 <= number < 2**31 for number in found)):
        raise ValueError(f"manifest: expected a word for each of {len(rows.task.classes)} classes, found {brief(list(found))}")
    for name, info in manifest.passes.items():
        layout.pass_name(name)
        _check_pass(name, info, rows)


def _check_pass(name: str, info: PassInfo, rows: RowsInfo) -> None:
    _check_distinct(f"pass {name}", [feature.feature for feature in info.features])
    _check_distinct(f"pass {name}", [static.name for static in info.statics])
    if info.intervention is not None:
        info.intervention.check(f"manifest: pass {name}", info.shape.layers)
        if not rows.paired:
            raise ValueError(f"manifest: pass {name} has an intervention, and its rows no partners")
    if len(info.shape.windows) != info.shape.layers:
        raise ValueError(f"manifest: pass {name}: expected a window for each of {info.shape.layers} blocks")
    for feature in info.features:
        key = feature.feature
        if key.pass_name or feature.key != str(key):
            raise ValueError(f"manifest: pass {name}: expected a key without a pass such as {key.of('')}, found {feature.key}")
        if key.layer is not None and key.layer > info.shape.layers:
            raise ValueError(f"manifest: pass {name}: {key} is of no block of a teacher of {info.shape.layers}")
        if any(not 0 <= word < info.shape.vocab for word in feature.ids):
            raise ValueError(f"manifest: pass {name}: {key}: expected ids below {info.shape.vocab}, found {max(feature.ids)}")
        _check_distinct(f"pass {name}: {key}", [array.name for array in feature.arrays])
        for array in feature.arrays:
            layout.array_name(key, array.name)
            chunk = rows.chunk(array, key.positions) * array.width * ITEM_BYTES[array.dtype]
            if array.compression != "none" and chunk > MOST_CHUNK_BYTES:
                raise ValueError(f"manifest: pass {name}: {key}: a compressed chunk of {chunk} bytes is above {MOST_CHUNK_BYTES}")
    for static in info.statics:
        layout.safe(static.name)
        if math.prod(static.shape) > MOST_STATIC:
            raise ValueError(f"manifest: pass {name}: weight {static.name} of shape {list(static.shape)} is larger than any")


def _check_distinct(where: str, names: Sequence[object]) -> None:
    if len(set(names)) < len(names):
        twice, _ = Counter(names).most_common(1)[0]
        raise ValueError(f"manifest: {where} has {brief(str(twice))} twice")
