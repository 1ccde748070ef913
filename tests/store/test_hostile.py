"""Stores that somebody made to do harm are refused with a sentence, at once, and without gigabytes."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import forge
import numcodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forge import Tree, read_all
from small_store import Made, answers, make_store, pass_info, spec

from store import RowWriter, Store, StoreError, StoreWriter, commits, layout
from store.manifest import MOST_BYTES, Filled, Part, manifest_bytes, read_manifest
from store.publish import file_crc32c
from store.verify import verify

MEMORY = 1 << 29
"""What reading a store of 50 kB may take beyond what a process has anyway."""

SECONDS = 10.0

ADVICE = r"mend it with|put back a copy|again|remove the|newer release|made by something else"
"""What a refusal tells people to do."""

GROUPS = [[(30, 3)], [(100, 9)], [(250, 0)], [(7, 7)], [(256, 17)]]
SPECS = (
    spec("hidden.1@all", "bfloat16"),
    spec("final@first"),
    spec("final@all", "float32", compression="zstd"),
    spec("lm_logits@labels:top3", "float16", 50),
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Made:
    made = make_store(tmp_path_factory.mktemp("good") / "store", GROUPS, SPECS, 256)
    read_all(made.path)
    verify(made.path)
    return made


@pytest.fixture
def path(good: Made, tmp_path: Path) -> Path:
    """A good store to do harm to."""
    return shutil.copytree(good.path, tmp_path / "store")


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Fail where the code hangs, or wants much memory."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"not refused within {SECONDS} s")

    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refused(path: Path, said: str) -> None:
    """Reading all of the store ends in an error of a few lines that says so; verifying finds something, or ends like it."""
    with limited():
        with pytest.raises(StoreError, match=said) as caught:
            read_all(path)
        assert len(str(caught.value)) < 4000
        assert re.search(ADVICE, str(caught.value))
        with contextlib.suppress(StoreError):
            assert verify(path)


def feature(number: int = 0, **change: object) -> Callable[[Tree], object]:
    return lambda tree: tree["passes"]["bert"]["features"][number].update(change)


def array(number: int = 0, **change: object) -> Callable[[Tree], object]:
    return lambda tree: tree["passes"]["bert"]["features"][number]["arrays"][0].update(change)


def static(**change: object) -> Callable[[Tree], object]:
    return lambda tree: tree["passes"]["bert"]["statics"][0].update(change)


def rows(**change: object) -> Callable[[Tree], object]:
    return lambda tree: tree["rows"].update(change)


def shape(**change: object) -> Callable[[Tree], object]:
    return lambda tree: tree["passes"]["bert"]["shape"].update(change)


def twice(items: Callable[[Tree], list]) -> Callable[[Tree], object]:
    return lambda tree: items(tree).append(items(tree)[0])


def nested(depth: int) -> list:
    tree: list = []
    for _ in range(depth):
        tree = [tree]
    return tree


def huge_topk(tree: Tree) -> None:
    tree["passes"]["bert"]["features"][3]["key"] = f"lm_logits@labels:top{10**12}"
    for each in tree["passes"]["bert"]["features"][3]["arrays"][:2]:
        each["width"] = 10**12


MANIFESTS: dict[str, tuple[Callable[[Tree], object], str]] = {
    "a pass that climbs out": (lambda tree: tree["passes"].update({"../../x": tree["passes"].pop("bert")}), "expected a pass name"),
    "a pass named like a folder of the store": (lambda tree: tree["passes"].update({"commits": tree["passes"]["bert"]}), "a pass name"),
    "a pass with a long name": (lambda tree: tree["passes"].update({"x" * 10**6: tree["passes"]["bert"]}), "expected a pass name"),
    "a key that climbs out": (feature(key="../hidden.1@all"), "expected a feature"),
    "a key that is an absolute path": (feature(key="/etc/passwd"), "expected a feature"),
    "a key written in another way": (feature(key="hidden.01@all"), r"expected a key .* such as hidden.1@all, found hidden.01@all"),
    "a long key": (feature(key="hidden.1@" + "a" * 10**6), "200 characters"),
    "a layer that the teacher lacks": (feature(key="hidden.99@all"), "of no block of a teacher of 1"),
    "an array that climbs out": (array(3, name="../../ids"), "has no arrays"),
    "a weight that climbs out": (static(name="../../x"), "expected a name"),
    "a weight that is an absolute path": (static(name="/etc/passwd"), "expected a name"),
    "a token array that climbs out": (lambda tree: tree["rows"]["token_arrays"][0].update(name="../x"), "expected a name"),
    "a token array of another type": (lambda tree: tree["rows"]["token_arrays"][0].update(dtype="float64"), "needs its type"),
    "a row part that climbs out": (lambda tree: tree["rows"]["parts"][0].update(file="../../etc/passwd"), "expected row parts part-00000"),
    "a billion slots": (rows(slots=10**9), "contradict"),
    "slots below nothing": (rows(slots=-1), "greater than or equal to 1"),
    "more rows than slots hold": (rows(rows=10**15), "contradict"),
    "a row part of more rows than there are": (lambda tree: tree["rows"]["parts"][0].update(rows=10**15), "contradict"),
    "row parts that cancel out": (
        lambda tree: tree["rows"].update(parts=[{**tree["rows"]["parts"][0], "rows": n} for n in (-9, 9 + tree["rows"]["rows"])]),
        "greater than or equal to 1",
    ),
    "slots of a petabyte": (rows(slot_tokens=2**50), "less than or equal to"),
    "slots that no chunk divides": (rows(slot_tokens=300), "multiple of 128"),
    "chunks larger than slots": (rows(chunk_tokens=2**40), "is not cut into chunks"),
    "slots with fewer tokens than rows": (lambda tree: tree["rows"]["filled"]["tokens"].__setitem__(0, -1), "contradict"),
    "slots that are overfull": (
        lambda tree: tree["rows"]["filled"].update(tokens=[10**6, *tree["rows"]["filled"]["tokens"][1:]]) or rows(tokens=10**6)(tree),
        "contradict|expected slots",
    ),
    "a bucket of a terabyte": (rows(bucket=2**40), "bucket: Input should be less"),
    "a bucket of nothing": (rows(bucket=0), "bucket: Input should be greater"),
    "a padding id of thirty digits": (rows(pad_id=10**30), "pad_id"),
    "more copies than numbers": (rows(copies=10**30), "copies"),
    "a width of a billion billions": (array(width=10**18), "width: Input should be less"),
    "a width below nothing": (array(width=-8), "width: Input should be greater"),
    "a trillion likeliest words": (huge_topk, "width: Input should be less"),
    "a compressed chunk of gigabytes": (array(2, width=2**24), "a compressed chunk of 8589934592 bytes"),
    "a weight of 10^15 numbers": (static(shape=[10**15]), "larger than any"),
    "a weight whose size is 2^64": (static(shape=[2**32, 2**32]), "larger than any"),
    "a weight of a thousand axes": (static(shape=[1] * 1000), "at most 8 items"),
    "a weight with an axis below nothing": (static(shape=[-8]), "greater than or equal to 1"),
    "a billion blocks": (shape(layers=10**9), "layers: Input should be less"),
    "fewer windows than blocks": (shape(windows=[]), "a window for each of 1 blocks"),
    "a vocabulary below nothing": (shape(vocab=-1), "vocab: Input should be greater"),
    "a checksum of 100 bits": (static(crc32c=2**100), "crc32c"),
    "a slot without a checksum": (lambda tree: tree["rows"]["slot_crcs"]["numbers"].pop(), "a checksum for each of"),
    "labels without numbers": (lambda tree: tree["rows"]["slot_crcs"].pop("numbers"), "a checksum for each of"),
    "checksums of an array that is none": (lambda tree: tree["rows"]["slot_crcs"].update(x=[]), "a checksum for each of"),
    "origins that overlap": (twice(lambda tree: tree["rows"]["origins"]), "contradict"),
    "no origin": (rows(origins=[]), "at least 1 item"),
    "a row part twice": (twice(lambda tree: tree["rows"]["parts"]), "contradict"),
    "a token array twice": (twice(lambda tree: tree["rows"]["token_arrays"]), "rows has 'input_ids' twice"),
    "a feature twice": (twice(lambda tree: tree["passes"]["bert"]["features"]), "pass bert has 'hidden.1@all' twice"),
    "a weight twice": (twice(lambda tree: tree["passes"]["bert"]["statics"]), "pass bert has .* twice"),
    "an array twice": (twice(lambda tree: tree["passes"]["bert"]["features"][0]["arrays"]), "has no arrays"),
    "a codec that is none": (feature(codec="pickle"), "codec"),
    "a type that is none": (array(dtype="object"), "dtype"),
    "a number as text": (rows(slots="many"), "slots"),
    "a list in place of an object": (lambda tree: tree.update(rows=[1, 2]), "rows"),
    "a million items of the wrong type": (lambda tree: tree["rows"]["filled"].update(rows=["x"] * 10**6), "filled.rows.0"),
    "a hundred thousand unknown keys": (lambda tree: tree.update({f"x{n}": 0 for n in range(10**5)}), "problems more"),
    "a million keys": (lambda tree: tree["rows"]["origins"][0]["options"].update({f"x{n}": 0 for n in range(530_000)}), "524,288 keys"),
    "options as deep as a well": (lambda tree: tree["rows"]["origins"][0].update(options={"a": nested(400)}), "options"),
    "schema 0": (lambda tree: tree.update(schema_version=0), "expected schema version 1 to 6, found 0; read it with a newer release"),
    "no tokens in a batch": (lambda tree: tree["passes"]["bert"].update(batch_tokens=0), "greater than or equal to 1"),
    "schema 7": (lambda tree: tree.update(schema_version=7), "found 7; read it with a newer release"),
    "schema as text": (lambda tree: tree.update(schema_version="2"), "found '2'"),
    "schema as a truth": (lambda tree: tree.update(schema_version=True), "found True"),
    "schema as a fraction": (lambda tree: tree.update(schema_version=2.0), "found 2.0"),
    "schema as a list": (lambda tree: tree.update(schema_version=[2]), r"found \[2\]"),
    "no schema": (lambda tree: tree.pop("schema_version"), "found none"),
    "a store of today that calls itself one of schema 1": (lambda tree: tree.update(schema_version=1), "not one of schema 1"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_lies_is_refused(path: Path, name: str) -> None:
    change, said = MANIFESTS[name]
    forge.manifest(path, change)
    refused(path, said)


def test_the_limits_leave_room_for_a_hundred_thousand_slots(path: Path) -> None:
    slots, manifest = 10**5, Store.open(path).manifest
    many = {
        "rows": 100 * slots,
        "tokens": 256 * slots,
        "slots": slots,
        "splits": {"train": 100 * slots},
        "filled": Filled(rows=(100,) * slots, tokens=(256,) * slots, labelled=(0,) * slots),
        "parts": tuple(Part(file=layout.rows_part_name(number), rows=50_000, crc32c=2**32 - 1) for number in range(slots // 500)),
        "slot_crcs": {name: (2**32 - 1,) * slots for name in manifest.rows.slot_crcs},
        "origins": (manifest.rows.origins[0].model_copy(update={"slots": slots}),),
    }
    large = manifest.model_copy(update={"rows": manifest.rows.model_copy(update=many)})
    layout.manifest(path).write_bytes(data := manifest_bytes(large))
    assert len(data) < MOST_BYTES // 3
    assert read_manifest(path) == large


def text_of(path: Path) -> str:
    text = (path / "manifest.json").read_text()
    return text[: text.rindex(",\n")] + "\n}"


TEXTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "deep nesting": (lambda path: (path / "manifest.json").write_text("[" * 10**6), "nested too deeply"),
    "deep nesting of objects": (lambda path: (path / "manifest.json").write_text('{"a":' * 10**5), "nested too deeply"),
    "a key twice": (
        lambda path: forge.manifest_text(path, text_of(path).replace('"rows": {', '"made": 0,\n "rows": {', 1)),
        "the key 'made' stands there twice",
    ),
    "not a number": (lambda path: forge.manifest_text(path, text_of(path).replace('"bucket": 16', '"bucket": NaN')), "NaN is no JSON"),
    "infinity": (
        lambda path: forge.manifest_text(path, text_of(path).replace('"bucket": 16', '"bucket": -Infinity')),
        "Infinity is no JSON",
    ),
    "a number beyond all": (lambda path: forge.manifest_text(path, text_of(path).replace('"bucket": 16', '"bucket": 1e999')), "bucket"),
    "a number of a million digits": (
        lambda path: forge.manifest_text(path, text_of(path).replace('"bucket": 16', f'"bucket": {"9" * 10**6}')),
        "damaged",
    ),
    "a byte order mark": (lambda path: forge.manifest_text(path, "\ufeff" + text_of(path)), "BOM"),
    "another encoding": (lambda path: forge.manifest_text(path, text_of(path), "utf-16"), "damaged"),
    "a third encoding": (lambda path: forge.manifest_text(path, text_of(path), "utf-32-le"), "damaged"),
    "half a letter": (lambda path: forge.manifest_text(path, text_of(path).replace('"bert"', '"\\ud800"', 1)), "expected a pass name"),
    "a terabyte": (lambda path: os.truncate(path / "manifest.json", 1 << 40), "expected at most 67,108,864 bytes"),
    "a wrong checksum": (
        lambda path: (path / "manifest.json").write_text((path / "manifest.json").read_text().replace('"bucket": 16', '"bucket": 32')),
        "fails its checksum",
    ),
    "no checksum": (lambda path: (path / "manifest.json").write_text(text_of(path)), "fails its checksum"),
    "something after its end": (
        lambda path: (path / "manifest.json").write_text((path / "manifest.json").read_text() + " "),
        "fails its checksum",
    ),
    "a number": (lambda path: (path / "manifest.json").write_text("7"), "found none"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_manifest_that_is_no_sound_json_is_refused(path: Path, name: str) -> None:
    harm, said = TEXTS[name]
    harm(path)
    refused(path, said)


FILES = {
    "the manifest": "manifest.json",
    "a row part": "rows/part-00000.parquet",
    "addresses": "rows/numbers/c.0.0",
    "labels": "rows/label/c.1.0",
    "tokens": "tokens/input_ids/c.1",
    "a raw shard": "bert/hidden.1/all/c.0.0",
    "a compressed shard": "bert/final/all/c.1.0",
    "a weight": "static/bert/1.query.bias/c.0",
    "the log": "commits/0.log",
}


INSTEAD: dict[str, Callable[[Path], object]] = {
    "a link": lambda file: file.symlink_to(file.with_name("moved")),
    "a link to a device": lambda file: file.symlink_to("/dev/zero"),
    "a link to itself": lambda file: file.symlink_to(file),
    "a pipe": os.mkfifo,
    "a folder": lambda file: file.mkdir(),
    "a terabyte of nothing": lambda file: (file.touch(), os.truncate(file, 1 << 40)),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("instead", INSTEAD)
def test_what_is_no_plain_file_of_its_size_is_refused_unread(path: Path, file: str, instead: str) -> None:
    place = path / FILES[file]
    shutil.copyfile(place, place.with_name("moved"))
    place.unlink()
    INSTEAD[instead](place)
    refused(path, r"found a (link|pipe|folder)|expected (at most )?[\d,]+ bytes|do not need 1099511627776 bytes|fails its checksum")


FOLDERS = [
    "rows",
    "rows/numbers",
    "tokens",
    "tokens/input_ids",
    "bert",
    "bert/hidden.1/all",
    "static",
    "static/bert/1.query.bias",
    "commits",
]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_that_leads_out_is_refused(path: Path, tmp_path: Path, folder: str) -> None:
    shutil.move(path / folder, tmp_path / "outside")
    (path / folder).symlink_to(tmp_path / "outside")
    refused(path, "but a link leads to .*outside.*; remove the link")


@pytest.mark.parametrize("file", FILES)
def test_what_may_not_be_read_is_refused(file: str, good: Made, tmp_path: Path) -> None:
    path = shutil.copytree(good.path, tmp_path / "store")
    for folder in (path, *path.parents):
        if tmp_path.parent.parent in folder.parents or folder == tmp_path.parent.parent:
            folder.chmod(0o755)
    (path / FILES[file]).chmod(0)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        if not os.access(path / "zarr.json", os.R_OK, effective_ids=True):
            pytest.skip("the folder of temporary files is closed to other users")
        refused(path, "may not be read")
    finally:
        if before == 0:
            os.seteuid(0)
    (path / FILES[file]).chmod(0o600)


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


LINES: dict[str, Callable[[Tree], object]] = {
    "a size below nothing": lambda record: record["files"].update({"final/first": [-1, 7]}),
    "a size of 10^18": lambda record: record["files"].update({"final/first": [10**18, 7]}),
    "a size of 10^30": lambda record: record["files"].update({"final/first": [10**30, 7]}),
    "a size that is a list": lambda record: record["files"].update({"final/first": [[1], 7]}),
    "a size that is a text": lambda record: record["files"].update({"final/first": ["12", 7]}),
    "a size that is a truth": lambda record: record["files"].update({"final/first": [True, 7]}),
    "a size of a compressed file below its index": lambda record: record["files"].update({"final/all": [3, 7]}),
    "a size of a compressed file of nothing": lambda record: record["files"].update({"final/all": [0, 0]}),
    "no size": lambda record: record["files"].update({"final/first": []}),
    "files that are a list": lambda record: record.update(files=[1, 2]),
    "files that are a number": lambda record: record.update(files=7),
    "a missing file": lambda record: record["files"].pop("final/first"),
    "a shard that is a text": lambda record: record.update(shard="../0"),
    "a shard below nothing": lambda record: record.update(shard=-1),
    "a shard of thirty digits": lambda record: record.update(shard=10**30),
    "a shard that is not there": lambda record: record.update(shard=99),
    "a pass that is a list": lambda record: record.update({"pass": []}),
    "a pass that is not there": lambda record: record.update({"pass": "../bert"}),
    "no shard": lambda record: record.pop("shard"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_commit_that_makes_no_sense_is_refused(path: Path, name: str) -> None:
    forge.log(path, lambda record: LINES[name](record) if record["shard"] == 0 else None)
    with limited():
        with pytest.raises(StoreError, match=r"mend it with|start its dump again"):
            read_all(path)
        verify(path)


@pytest.mark.parametrize("text", [b"[" * 10**5, b"7", b"null", b'{"pass": NaN}', b'{"a": 1, "a": 1}', b'{"a":' * 10**5, b"\xff\xfe", b""])
def test_a_line_of_the_log_that_is_no_commit_is_refused(path: Path, text: bytes) -> None:
    log = path / "commits" / "0.log"
    log.write_bytes(forge.line(text) + log.read_bytes())
    refused(path, r"0.log: .* fails? .* checksum; mend it with: teacher-dump verify --repair")


@pytest.mark.parametrize("instead", INSTEAD)
def test_a_table_of_commits_that_is_no_plain_file_is_refused(path: Path, instead: str) -> None:
    commits.compact(path)
    table = layout.commit_table(path)
    shutil.copyfile(table, table.with_name("moved"))
    table.unlink()
    INSTEAD[instead](table)
    refused(path, r"table.log: (expected a plain file|expected at most|the file|lines)")


TABLES: dict[str, Tree | list | int] = {
    "lists of another length": {"pass": "bert", "arrays": ["final/all"], "shards": [0, 1], "bytes": [[1]], "crc32c": [[1]]},
    "lists that are none": {"pass": "bert", "arrays": 7, "shards": 7, "bytes": 7, "crc32c": 7},
    "deep lists": {"pass": "bert", "arrays": ["final/all"], "shards": [nested(90)], "bytes": [[1]], "crc32c": [[1]]},
    "numbers beyond all": {"pass": "bert", "arrays": ["final/all"], "shards": [10**30], "bytes": [[1]], "crc32c": [[1]]},
    "no object": [1, 2, 3],
    "a number": 7,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_line_of_the_table_of_commits_that_is_no_commit_is_refused(path: Path, name: str) -> None:
    commits.compact(path)
    table = layout.commit_table(path)
    lines = table.read_bytes().splitlines(keepends=True)
    table.write_bytes(b"".join([lines[0], forge.line(json.dumps(TABLES[name]).encode()), *lines[2:]]))
    refused(path, "table.log: .* fail their checksum; mend it with: teacher-dump verify --repair")


def parquet(path: Path, change: Callable[[pa.Table], pa.Table], **options: object) -> None:
    """Put another row part, with its checksum."""
    file = path / "rows" / "part-00000.parquet"
    pq.write_table(change(pq.read_table(file)), file, **options)
    crc = file_crc32c(file)
    forge.manifest(path, lambda tree: tree["rows"]["parts"][0].update(crc32c=crc))


def with_column(name: str, values: list) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(name)
        return table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))

    return change


def repeated(table: pa.Table) -> pa.Table:
    return table.take(pa.array(np.zeros(5_000_000, np.int64)))


PARQUETS: dict[str, tuple[Callable[[Path], object], str]] = {
    "other columns": (lambda path: parquet(path, lambda table: table.drop_columns(["spans"])), "other columns"),
    "a column more": (lambda path: parquet(path, lambda table: table.append_column("x", table["copy"])), "other columns"),
    "columns of another type": (
        lambda path: parquet(path, lambda table: table.set_column(1, "copy", table["copy"].cast(pa.int64()))),
        "other columns",
    ),
    "fewer rows": (lambda path: parquet(path, lambda table: table.slice(1)), "expected 5 rows, found 4"),
    "five million rows": (lambda path: parquet(path, repeated), "expected 5 rows, found 5000000"),
    "a text of a megabyte in every row": (
        lambda path: parquet(path, with_column("source", ["x" * 10**6] * 5)),
        "too many for 5 rows|do not need",
    ),
    "no text": (lambda path: parquet(path, with_column("split", [None] * 5)), "rows without a split"),
    "spans without end": (
        lambda path: parquet(path, with_column("spans", [[{"start": 0, "end": 1}] * 10**6] + [[]] * 4)),
        "asks for more memory",
    ),
    "another compression": (lambda path: parquet(path, lambda table: table, compression="zstd"), "asks for more memory"),
    "text": (lambda path: (path / "rows" / "part-00000.parquet").write_text("mine"), "expected crc32c"),
}


@pytest.mark.parametrize("name", PARQUETS)
def test_a_row_part_that_is_another_is_refused(path: Path, name: str) -> None:
    harm, said = PARQUETS[name]
    harm(path)
    refused(path, said)


@pytest.mark.parametrize(
    "data", [b"", b"PAR1", b"PAR1" * 3, b"PAR1" + b"\xff" * 1000 + b"\xe8\x03\0\0PAR1", b"PAR1" + b"\0" * 64 + b"\x40\0\0\0PAR1"]
)
def test_a_row_part_that_is_no_parquet_is_refused(path: Path, data: bytes) -> None:
    (path / "rows" / "part-00000.parquet").write_bytes(data)
    forge.manifest(path, lambda tree: tree["rows"]["parts"][0].update(crc32c=file_crc32c(path / "rows" / "part-00000.parquet")))
    refused(path, "has a damaged part-00000.parquet: it cannot be decoded")


NUMBERS: dict[str, tuple[int, int, int]] = {
    "a row before its slot": (0, 0, -5),
    "a row beyond its slot": (1, 0, 10**6),
    "rows that overlap": (1, 0, 7),
    "a row without tokens": (0, 1, 0),
    "a row of two billion tokens": (0, 1, 2**31 - 1),
    "more labelled tokens than tokens": (0, 2, 31),
    "labelled tokens that overlap": (1, 3, 0),
    "a group that does not begin at nothing": (0, 4, 1),
    "a group that jumps": (1, 4, 5),
    "a copy that is not there": (0, 5, 1),
    "a copy below nothing": (0, 5, -1),
    "a split that is not there": (0, 6, 2),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_addresses_that_rows_cannot_have_are_refused(path: Path, name: str) -> None:
    row, column, value = NUMBERS[name]
    numbers = Store.open(path).rows.in_slot(0).copy()
    numbers[row, column] = value
    forge.row_slot(path, "numbers", 0, numbers)
    refused(path, "holds addresses in slot 0 that rows cannot have; rows cannot be mended: remove the folder")


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


def test_writers_follow_no_links_out(path: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for name in ("commits/0.lock", "commits/1.log", "bert/hidden.1/all/.c.0.0.0.tmp", ".manifest.json.0.tmp"):
        place = path / name
        place.unlink(missing_ok=True)
        place.symlink_to(mine)
    (path / "commits" / "0.log").write_text("")  # nothing is committed: all of it will be written
    with limited(), contextlib.suppress(StoreError), StoreWriter.open(path) as writer:
        made = Made(path, make_store(tmp_path / "same", GROUPS, SPECS, 256).rows)
        writer.add_pass("second", pass_info(SPECS[:1]), {})
        writer.commit("bert", 0, answers(made, 0, SPECS, writer.rows.columns.slot))
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("name", ["commits/0.lock", "commits/store.lock", "commits/0.log", "commits"])
def test_writers_wait_for_no_pipes(path: Path, name: str) -> None:
    place = path / name
    shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    os.mkfifo(place)
    with limited(), contextlib.suppress(StoreError), StoreWriter.open(path) as writer:
        writer.add_pass("second", pass_info(SPECS[:1]), {})


def test_a_build_in_a_hostile_folder_follows_no_links(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "c.0").write_text("mine")
    store = tmp_path / "store"
    (store / "tokens").mkdir(parents=True)
    (store / ".building").touch()
    (store / "tokens" / "input_ids").symlink_to(mine)
    with limited(), pytest.raises(StoreError, match="remove the link"):
        RowWriter(store, 128)
    assert (mine / "c.0").read_text() == "mine"
