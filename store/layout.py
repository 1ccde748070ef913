"""Where everything in a store lies. Every path follows from a rule, so that nobody has to list a directory.

No name that comes from a manifest, a log or a recipe can lead out of the store: each is one checked path component.
"""

import re
from pathlib import Path

from store.errors import StoreError
from store.features import FeatureKey
from store.strict import brief

MANIFEST = "manifest.json"
BUILDING = ".building"
"""Present while a store is built; with no manifest beside it, the build was cut short and the next one starts over.
It holds the command where that is not a build of rows from text."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
_PASS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,199}")
_DROPPED = re.compile(r"\.[A-Za-z0-9][A-Za-z0-9_-]*\.dropped")
_RESERVED = frozenset({"rows", "tokens", "static", "model", "commits", "claims"})


def safe(name: str) -> str:
    """``name`` if it is one harmless path component, else a StoreError."""
    if not _NAME.fullmatch(name):
        raise StoreError(
            f"expected a name of letters, digits, '.', '_' and '-' in the store, found {brief(name)}; the store was made by something else"
        )
    return name


def inside(store: Path, path: Path) -> Path:
    """``path`` if links do not lead it out of ``store``, else a StoreError; asked before anything is written or cleared there."""
    try:
        where = path.resolve()
        if where.is_relative_to(store.resolve()):
            return path
    except (OSError, RuntimeError):  # of links that lead to one another
        where = path
    raise StoreError(f"expected {path} inside {store}, but a link leads to {where}; remove the link")


def pass_name(name: str) -> str:
    """``name`` if a pass may have it, else a ValueError."""
    if not is_pass(name):
        reserved = ", ".join(sorted(_RESERVED))
        raise ValueError(f"expected a pass name of letters, digits, '_' and '-' other than {reserved}, found {brief(name)}")
    return name


def is_pass(name: str) -> bool:
    """Whether a pass may have this name."""
    return bool(_PASS.fullmatch(name)) and name not in _RESERVED


def dropped(store: Path, name: str) -> Path:
    """Where the folder of a pass goes before it is removed: a name that nothing else has, so that a killed removal is known as one."""
    return store / f".{safe(name)}.dropped"


def is_dropped(name: str) -> bool:
    """Whether an entry of a store's folder is a pass on its way out."""
    return bool(_DROPPED.fullmatch(name))


def manifest(store: Path) -> Path:
    return store / MANIFEST


def building(store: Path) -> Path:
    return store / BUILDING


def rows_part_name(number: int) -> str:
    """Name of Parquet file ``number`` of the row table."""
    return f"part-{number:05}.parquet"


def rows_part(store: Path, number: int) -> Path:
    """Parquet file ``number`` of the row table."""
    return store / "rows" / rows_part_name(number)


def rows_array(store: Path, name: str) -> Path:
    """Folder of an array of the row table."""
    return store / "rows" / safe(name)


def tokens(store: Path, name: str) -> Path:
    """Folder of a token array."""
    return store / "tokens" / safe(name)


def array_name(key: FeatureKey, array: str) -> str:
    """Where an array of ``key`` lies below its pass: ``hidden.6/all``, ``lm_logits/labels.top64/ids``."""
    positions = f"{key.positions}.{key.form}" if key.form else key.positions
    return "/".join([key.name, positions, *([safe(array)] if array else [])])


def array(store: Path, pass_: str, name: str) -> Path:
    """Folder of the array that :func:`array_name` calls ``name``."""
    return store.joinpath(safe(pass_), *(safe(part) for part in name.split("/")))


def static(store: Path, pass_: str, name: str) -> Path:
    """Folder of a weight that ships with a pass."""
    return store / "static" / safe(pass_) / safe(name)


def model(store: Path, pass_: str) -> Path:
    """Folder of the teacher's configuration, tokenizer and the blocks that ship with a pass."""
    return store / "model" / safe(pass_)


def pass_folders(store: Path, pass_: str) -> tuple[Path, ...]:
    """All folders that belong to one pass alone."""
    return store / safe(pass_), store / "static" / safe(pass_), model(store, pass_)


def slot_file(folder: Path, slot: int, dimensions: int = 2) -> Path:
    """File of one slot: ``c.<slot>.0`` in a feature's folder, ``c.<slot>`` in a token array's."""
    return folder / (f"c.{slot}.0" if dimensions == 2 else f"c.{slot}")


def log(store: Path, writer: int, generation: int = 0) -> Path:
    """Commit log of a writer; writers are numbered from 0. A generation ends when all logs are folded into the table."""
    return store / "commits" / (f"{writer}.{generation}.log" if generation else f"{writer}.log")


def commit_table(store: Path) -> Path:
    """What the logs of all earlier generations said, and which generation is now."""
    return store / "commits" / "table.log"


def lock(store: Path, writer: int) -> Path:
    """File whose advisory lock a writer holds as long as it lives."""
    return store / "commits" / f"{writer}.lock"


def store_lock(store: Path) -> Path:
    """File that writers lock for sharing, and who changes the store as a whole for itself."""
    return store / "commits" / "store.lock"


def passes_lock(store: Path) -> Path:
    """File that a writer locks while it announces a pass."""
    return store / "commits" / "passes.lock"


def claims(store: Path, pass_: str) -> Path:
    """Folder of the claims on a pass: ``<shard>.<epoch>``, each a hard link to the lock of the writer that claims it."""
    return store / "claims" / safe(pass_)


def claims_lock(store: Path) -> Path:
    """File that a writer locks while it claims shards."""
    return store / "claims" / "claims.lock"


def turn_lock(store: Path, writer: int) -> Path:
    """File that a writer locks while it commits a shard, so that nobody takes the shard over meanwhile."""
    return store / "claims" / f"{writer}.lock"


def temporary(path: Path, writer: int = 0) -> Path:
    """Where ``writer`` prepares ``path``: beside it, by rule, so that the next try overwrites what a kill left."""
    return path.with_name(f".{path.name}.{writer}.tmp")
