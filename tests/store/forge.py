"""Stores as one who means harm would make them: every checksum is right, only the content is not."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from store import Store, layout
from store.publish import crc32c

Tree = dict[str, Any]


def read_all(path: Path, mapped: bool | None = None) -> bytes:
    """Everything the store promises to hold, as bytes."""
    store = Store.open(path, mapped)
    rows = np.arange(len(store.rows))
    found = [store.tokens(array.name, rows).tobytes() for array in store.manifest.rows.token_arrays]
    for name, info in store.manifest.passes.items():
        for feature in info.features:
            found += [values.tobytes() for values in store.read(feature.feature.of(name), rows).values()]
        found += [values.tobytes() for values in store.statics(name).values()]
    found += [column.tobytes() for column in vars(store.rows.columns).values()]
    found += [store.rows.label.tobytes(), repr(store.rows.table.to_pylist()).encode()]
    return b"".join(found)


def manifest(path: Path, change: Callable[[Tree], object]) -> None:
    """Change the manifest."""
    tree = json.loads((path / "manifest.json").read_text())
    del tree["crc32c"]
    change(tree)
    manifest_text(path, json.dumps(tree, indent=1))


def manifest_text(path: Path, text: str, encoding: str = "utf-8") -> None:
    """Put a manifest of any text, with a checksum."""
    body = text.removesuffix("\n}").encode(encoding) + b",\n"
    (path / "manifest.json").write_bytes(body + b' "crc32c": %d\n}\n' % crc32c(body))


def log(path: Path, change: Callable[[Tree], object]) -> None:
    """Change what each line of the first commit log says."""
    records = [json.loads(line.partition(" ")[2]) for line in (path / "commits" / "0.log").read_text().splitlines()]
    for record in records:
        change(record)
    (path / "commits" / "0.log").write_bytes(b"".join(line(json.dumps(record).encode()) for record in records))


def line(text: bytes) -> bytes:
    """A line of a commit log."""
    return b"%08x %s\n" % (crc32c(text), text)


def slot(path: Path, array: str, number: int, chunks: Sequence[bytes], index: Sequence[tuple[int, int]], slots_of: int) -> None:
    """Commit a slot file of pass ``bert`` with these chunks, and an index of ``slots_of`` places, whatever that says of them."""
    sums = [crc32c(chunk).to_bytes(4, "little") for chunk in chunks]
    pairs = np.full((slots_of, 2), 2**64 - 1, "<u8")
    for place, pair in enumerate(index):
        pairs[place] = pair
    data = b"".join(chunk + crc for chunk, crc in zip(chunks, sums, strict=True))
    data += pairs.tobytes() + crc32c(pairs.tobytes()).to_bytes(4, "little")
    layout.slot_file(path / "bert" / array, number).write_bytes(data)

    def reseal(record: Tree) -> None:
        if record["shard"] == number:
            record["files"][array] = [len(data), crc32c(b"".join(sums))]

    log(path, reseal)


def pairs(chunks: Sequence[bytes]) -> list[tuple[int, int]]:
    """The index that these chunks should have."""
    lengths = [len(chunk) + 4 for chunk in chunks]
    return list(zip(np.cumsum([0, *lengths[:-1]]).tolist(), lengths, strict=True))


def row_slot(path: Path, name: str, number: int, values: np.ndarray) -> None:
    """Put these rows in an array of the row table."""
    whole = np.zeros((128, values.shape[1]), values.dtype)
    whole[: len(values)] = values
    chunk = whole.tobytes()
    file = layout.slot_file(path / "rows" / name, number)
    old = file.read_bytes()
    file.write_bytes(chunk + crc32c(chunk).to_bytes(4, "little") + old[len(chunk) + 4 :])
    seal = crc32c(crc32c(chunk).to_bytes(4, "little"))
    manifest(path, lambda tree: tree["rows"]["slot_crcs"][name].__setitem__(number, seal))
