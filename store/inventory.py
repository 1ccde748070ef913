"""Every file that a store consists of, by the rules of its manifest and commits: where it lies and what it must be."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from store import hierarchy, layout, lines
from store.commits import Commit
from store.errors import CorruptShard
from store.features import ITEM_BYTES
from store.manifest import Manifest, PassInfo, RowsInfo, Static
from store.plain import open_plain, pieces, read_plain, why
from store.publish import crc32c
from store.shards import CRC_BYTES, Seal, Shard
from store.slot_file import SlotFile
from store.table import RowTable

MOST_LISTED = 10_000
"""Files that may ship with a pass."""
MOST_LIST_BYTES = 1 << 22
SMALL_BYTES = 4 << 20
"""Files up to this size are read whole before they are trusted: those of rows and tokens."""
_MOST_PART_BYTES = 1 << 14
"""A row may weigh so much in a Parquet file."""


@dataclass(frozen=True)
class Item:
    """One file of a store."""

    path: Path
    size: int | None
    """Bytes; None where only the file itself says how many, ``most`` at most."""
    seal: str
    """What tells one version of it from others."""
    problem: Callable[[Path], str | None]
    """What is wrong with a file that should be this one, every byte of it read; None if nothing."""
    most: int = 0
    small: bool = True
    """Whether reading it whole costs next to nothing."""


def slot_item(path: Path, shard: Shard, seal: Seal) -> Item:
    """The slot file ``path``."""
    problem = partial(_slot_problem, shard=shard, seal=seal)
    return Item(path, seal.size, f"{seal.size}-{seal.crc32c}", problem, small=seal.size <= SMALL_BYTES)


def believable(shard: Shard, seal: Seal) -> bool:
    """Whether a slot file can have the size of ``seal``: what is not believed is never asked for."""
    return seal.size == shard.size if shard.raw else shard.index_bytes <= seal.size <= shard.size


def part_item(store: Path, rows: RowsInfo, number: int) -> Item:
    """Parquet file ``number`` of the row table."""
    part = rows.parts[number]
    problem = partial(_whole_problem, seal=Seal(-1, part.crc32c))
    return Item(layout.rows_part(store, number), None, f"{part.crc32c}", problem, part.rows * _MOST_PART_BYTES + (1 << 20))


def static_items(store: Path, pass_name: str, info: PassInfo) -> Iterator[Item]:
    """The weights of a pass."""
    for static in info.statics:
        size = math.prod(static.shape) * ITEM_BYTES[static.dtype] + CRC_BYTES
        path = layout.static(store, pass_name, static.name) / ".".join(["c", *["0"] * len(static.shape)])
        yield Item(path, size, f"{size}-{static.crc32c}", partial(_static_problem, static=static, size=size))


def row_items(store: Path, manifest: Manifest) -> Iterator[Item]:
    """Rows and tokens."""
    rows = RowTable(store, manifest.rows)
    yield from (part_item(store, manifest.rows, number) for number in range(len(manifest.rows.parts)))
    for name, array in manifest.rows.row_arrays.items():
        for slot, crc in enumerate(manifest.rows.slot_crcs[name]):
            shard = rows.shard(array, "row", slot)
            yield slot_item(layout.slot_file(layout.rows_array(store, name), slot), shard, Seal(shard.size, crc))
    for array in manifest.rows.token_arrays:
        for slot, crc in enumerate(manifest.rows.slot_crcs[array.name]):
            shard = rows.shard(array, "all", slot)
            yield slot_item(layout.slot_file(layout.tokens(store, array.name), slot, dimensions=1), shard, Seal(shard.size, crc))


def shard_items(store: Path, manifest: Manifest, commits: Iterable[Commit]) -> Iterator[Item]:
    """The files of committed shards, without those of passes and slots that the manifest does not name.

    Raises:
        CorruptShard: a commit lacks an array of its pass, or says of one what cannot be.
    """
    rows = RowTable(store, manifest.rows)
    for commit in commits:
        info = manifest.passes.get(commit.pass_name)
        if info is None or commit.shard >= manifest.rows.slots:
            continue
        for spec in info.features:
            for array in spec.arrays:
                name = layout.array_name(spec.feature, array.name)
                path = layout.slot_file(layout.array(store, commit.pass_name, name), commit.shard)
                shard, seal = rows.shard(array, spec.feature.positions, commit.shard, info.shape.vocab), commit.files.get(name)
                if seal is None or not believable(shard, seal):
                    raise CorruptShard(
                        f"{path}: its commit does not say what it must be; mend it with: teacher-dump verify --repair {store}"
                    )
                yield slot_item(path, shard, seal)


def metadata_items(store: Path, manifest: Manifest) -> Iterator[Item]:
    """The ``zarr.json`` files, which follow from the manifest; the root's comes last."""
    for name, data in hierarchy.documents(manifest).items():
        seal = Seal(len(data), crc32c(data))
        yield Item(store / name / "zarr.json", seal.size, f"{seal.size}-{seal.crc32c}", partial(_whole_problem, seal=seal))


def listing(store: Path, pass_name: str) -> Path:
    """Where object storage lists what is below ``model/<pass>/``: nothing else says which files there are."""
    return layout.model(store, pass_name).with_suffix(".list")


def listing_item(store: Path, pass_name: str) -> Item:
    """That list."""
    return Item(listing(store, pass_name), None, "", lambda path: None, MOST_LIST_BYTES)


def listing_bytes(store: Path, pass_name: str) -> bytes:
    """The list of what is below ``model/<pass>/``: name -> bytes and crc32c, on one line that is checked like those of logs."""
    folder, files = layout.model(store, pass_name), {}
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() and not path.name.startswith("."):
            with os.fdopen(open_plain(path), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                files["/".join(map(layout.safe, path.relative_to(folder).parts))] = [size, _crc32c(file.fileno(), size)]
    return lines.line({"files": files})


def listed_items(store: Path, pass_name: str, file: Path) -> list[Item]:
    """What the list in ``file`` says is below ``model/<pass>/``.

    Raises:
        CorruptShard: it is no such list.
    """
    try:
        record = lines.parsed(read_plain(file, MOST_LIST_BYTES))
        files = {str(name): Seal(int(size), int(crc)) for name, (size, crc) in record["files"].items()}
        if len(files) > MOST_LISTED or any(seal.size < 0 for seal in files.values()):
            raise ValueError("it names too much")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptShard(
            f"{file}: the list of files that ship with pass {pass_name} is damaged ({error}); upload the store again"
        ) from None
    folder = layout.model(store, pass_name)
    return [
        Item(
            folder.joinpath(*map(layout.safe, name.split("/"))), seal.size, f"{seal.size}-{seal.crc32c}", partial(_whole_problem, seal=seal)
        )
        for name, seal in files.items()
    ]


def _slot_problem(path: Path, shard: Shard, seal: Seal) -> str | None:
    try:
        file = SlotFile(path, shard, seal, mapped=False)
        for chunk in range(shard.chunks):
            file.check(chunk)
    except CorruptShard as error:
        return str(error).removeprefix(f"{path}: ")
    return None


def _whole_problem(path: Path, seal: Seal) -> str | None:
    """What is wrong with a file of which the crc32c of all bytes is known (and the size, unless that is negative)."""

    def problem(handle: int, size: int) -> str | None:
        if seal.size not in (-1, size):
            return f"expected {seal.size} bytes, found {size}"
        return None if _crc32c(handle, size) == seal.crc32c else "the file fails its checksum"

    return _looked_at(path, problem)


def _static_problem(path: Path, static: Static, size: int) -> str | None:
    def problem(handle: int, found: int) -> str | None:
        if found != size:
            return f"expected {size} bytes, found {found}"
        last = os.pread(handle, CRC_BYTES, size - CRC_BYTES)
        sealed = last == static.crc32c.to_bytes(CRC_BYTES, "little") and _crc32c(handle, size - CRC_BYTES) == static.crc32c
        return None if sealed else "the file fails its checksum"

    return _looked_at(path, problem)


def _looked_at(path: Path, problem: Callable[[int, int], str | None]) -> str | None:
    try:
        with os.fdopen(open_plain(path), "rb") as file:
            return problem(file.fileno(), os.fstat(file.fileno()).st_size)
    except OSError as error:
        return why(error)


def _crc32c(handle: int, size: int) -> int:
    crc = 0
    for piece in pieces(handle, size):
        crc = crc32c(piece, crc)
    return crc
