"""Indexes and compressed chunks that lie are refused with a sentence, and other Zarr metadata are found."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import forge
import numcodecs
import numpy as np
import pytest
from forge import read_all
from harm import SPECS, array, limited, refused, rows
from small_store import Made

from store import Store, StoreError
from store.verify import verify


def raw_chunks(path: Path) -> list[bytes]:
    """The chunks of slot 1 of final@all, decompressed; two of 128 tokens."""
    store = Store.open(path)
    values = store.read(SPECS[2].feature.of("bert"), store.rows.rows_of(1))[""]
    return [np.resize(values[start : start + 128], (128, 8)).tobytes() for start in (0, 128)]


def frames(path: Path) -> list[bytes]:
    codec = numcodecs.Blosc(cname="zstd", clevel=1, shuffle=numcodecs.Blosc.BITSHUFFLE)
    return [codec.encode(np.frombuffer(chunk, np.float32)) for chunk in raw_chunks(path)]


def lied(frame: bytes, at: int, value: int) -> bytes:
    return frame[:at] + struct.pack("<I", value) + frame[at + 4 :]


INDEXES: dict[str, Callable[[list[tuple[int, int]]], list[tuple[int, int]]]] = {
    "chunks change places": lambda pairs: pairs[::-1],
    "chunks overlap": lambda pairs: [pairs[0], pairs[0]],
    "a chunk lies beyond the end": lambda pairs: [pairs[0], (1 << 40, pairs[1][1])],
    "a chunk ends beyond the end": lambda pairs: [pairs[0], (pairs[1][0], 1 << 40)],
    "a chunk has a size that wraps around": lambda pairs: [pairs[0], (pairs[1][0], 2**64 - 2)],
    "a chunk is empty": lambda pairs: [pairs[0], (pairs[1][0], 0)],
    "chunks leave a gap": lambda pairs: [(0, pairs[0][1] - 1), pairs[1]],
    "a chunk is missing": lambda pairs: pairs[:1],
    "a chunk too many": lambda pairs: [*pairs, pairs[0]],
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_lies_is_refused(path: Path, name: str) -> None:
    chunks = frames(path)
    forge.slot(path, "final/all", 1, chunks, forge.pairs(chunks), 3 if "too many" in name else 2)
    if "too many" not in name:
        read_all(path)
    forge.slot(path, "final/all", 1, chunks, INDEXES[name](forge.pairs(chunks)), 3 if "too many" in name else 2)
    refused(path, r"final/all/c.1.0: (the chunk index is damaged|expected .* bytes); mend it with teacher-dump verify --repair")


@pytest.mark.parametrize("name", [name for name in INDEXES if "too many" not in name])
def test_an_index_of_raw_chunks_that_lies_is_refused(path: Path, name: str) -> None:
    chunks = raw_chunks(path)
    forge.manifest(path, array(2, compression="none"))
    forge.manifest(path, rows(chunk_tokens=128))
    forge.slot(path, "final/all", 1, chunks, INDEXES[name](forge.pairs(chunks)), 2)
    store = Store.open(path)
    with limited(), pytest.raises(StoreError, match=r"final/all/c.1.0: the chunk index is damaged; mend it with"):
        store.read(SPECS[2].feature.of("bert"), store.rows.rows_of(1))


FRAMES: dict[str, Callable[[bytes], bytes]] = {
    "says that it holds four gigabytes": lambda frame: lied(frame, 4, 2**32 - 1),
    "says that it holds less": lambda frame: lied(frame, 4, 128),
    "says that it is longer": lambda frame: lied(frame, 12, len(frame) + 1000),
    "says that it is shorter": lambda frame: lied(frame, 12, 20),
    "has blocks of nothing": lambda frame: lied(frame, 8, 0),
    "has blocks of gigabytes": lambda frame: lied(frame, 8, 2**31),
    "leads its blocks astray": lambda frame: lied(frame, 16, 2**31 - 1),
    "is of another version": lambda frame: b"\xff" + frame[1:],
    "is of a codec that is none": lambda frame: frame[:2] + b"\xff" + frame[3:],
    "is cut off": lambda frame: frame[:40],
    "is less than its own header": lambda frame: frame[:10],
    "is nothing": lambda frame: b"",
    "is text": lambda frame: b"a bomb" * 30,
    "blows up": lambda frame: bytes(numcodecs.Blosc(cname="zstd", clevel=9).encode(np.zeros(1 << 26, np.uint8))),
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_compressed_chunk_that_lies_is_refused(path: Path, name: str) -> None:
    first, last = frames(path)
    chunks = [FRAMES[name](first), last]
    forge.slot(path, "final/all", 1, chunks, forge.pairs(chunks), 2)
    refused(
        path,
        r"final/all/c.1.0: (chunk 0 cannot be decompressed|the chunk index|expected .* bytes).*; mend it with teacher-dump verify --repair",
    )


ZARR: dict[str, Callable[[Path], object]] = {
    "another byte order": lambda file: file.write_text(file.read_text().replace('"little"', '"big"', 1)),
    "another shape": lambda file: file.write_text(file.read_text().replace("1024", "1023", 1)),
    "another type": lambda file: file.write_text(file.read_text().replace('"uint16"', '"int16"', 1)),
    "another fill value": lambda file: file.write_text(file.read_text().replace("32704", "0", 1)),
    "no text": lambda file: file.write_bytes(b""),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "a link": lambda file: (file.rename(file.with_name("moved")), file.symlink_to(file.with_name("moved"))),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a terabyte": lambda file: os.truncate(file, 1 << 40),
    "nothing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("name", ZARR)
def test_other_zarr_metadata_misleads_plain_zarr_alone_and_is_found(path: Path, good: Made, name: str) -> None:
    file = path / "bert" / "hidden.1" / "all" / "zarr.json"
    ZARR[name](file)
    with limited():
        assert read_all(path) == read_all(good.path)
        assert [(problem.file, problem.repairs) for problem in verify(path)] == [(file, True)]
