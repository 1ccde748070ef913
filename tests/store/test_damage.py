"""No damage to what was committed goes unnoticed."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from forge import read_all
from small_store import GROUPS, SPECS, Made, answers, content, make_store, spec

from store import CorruptShard, MissingFeature, Store, StoreError, StoreWriter, commits, hierarchy, layout
from store.manifest import read_manifest
from store.table import RowTable
from store.verify import repair, verify

OFFSETS = 200
"""Bytes that are damaged in each file, or all of a shorter one."""

COMPRESSED = (spec("final@all", "float32", compression="zstd"), spec("hidden.0@all", "int8", compression="zstd"))


def looks(path: Path) -> dict[Path, Callable[[], object]]:
    """Each file that readers look at, and the reading that touches it."""
    manifest = read_manifest(path)
    store = Store(path, manifest)
    _ = store.rows.columns, store.rows.label, store.committed("bert")

    def rows_of(slot: int) -> np.ndarray:
        store.rows.files.forget()
        return store.rows.rows_of(slot)

    found: dict[Path, Callable[[], object]] = {layout.manifest(path): partial(read_manifest, path)}
    found |= {layout.rows_part(path, number): lambda: RowTable(path, manifest.rows).table for number in range(len(manifest.rows.parts))}
    for slot in range(manifest.rows.slots):
        found[layout.slot_file(layout.rows_array(path, "numbers"), slot)] = lambda slot=slot: RowTable(path, manifest.rows).in_slot(slot)
        found[layout.slot_file(layout.rows_array(path, "label"), slot)] = lambda: RowTable(path, manifest.rows).label
        for array in manifest.rows.token_arrays:
            file = layout.slot_file(layout.tokens(path, array.name), slot, dimensions=1)
            found[file] = lambda slot=slot, name=array.name: store.tokens(name, rows_of(slot))
        for feature in manifest.passes["bert"].features:
            key = feature.feature.of("bert")
            for array in feature.arrays:
                file = layout.slot_file(layout.array(path, "bert", layout.array_name(feature.feature, array.name)), slot)
                found[file] = lambda slot=slot, key=key: store._read_all([key], rows_of(slot), None)  # read_all looks twice
    for static in manifest.passes["bert"].statics:
        file = layout.static(path, "bert", static.name) / ".".join(["c", *"0" * len(static.shape)])
        found[file] = lambda: store.statics("bert")
    return found


def damages(file: Path, chance: random.Random, offsets: int = OFFSETS) -> Iterator[int]:
    """Change one byte after the other and put it back: all of a short file, else as many as ``offsets``, ends included."""
    whole = file.read_bytes()
    places = range(len(whole)) if len(whole) <= offsets else sorted({0, len(whole) - 1, *chance.sample(range(len(whole)), offsets)})
    with file.open("rb+", buffering=0) as handle:
        for place in places:
            flipped = whole[place] ^ 1 << chance.randrange(8)
            replaced = (whole[place] + chance.randrange(1, 256)) % 256
            os.pwrite(handle.fileno(), bytes([chance.choice([flipped, replaced])]), place)
            yield place
            os.pwrite(handle.fileno(), whole[place : place + 1], place)


def refused(look: Callable[[], object]) -> bool:
    """Whether a reading ends in an error of the store."""
    try:
        look()
    except StoreError:
        return True
    return False


def guarded(files: dict[Path, Callable[[], object]]) -> int:
    """Damage every file and see that reading it fails; how often that was tried."""
    chance, tried = random.Random(7), 0
    for file, look in files.items():
        look()
        for place in damages(file, chance):
            assert refused(look), f"{file}: another byte {place} is not noticed"
            tried += 1
        look()
    return tried


def test_every_byte_of_compressed_shards_is_guarded(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", GROUPS, COMPRESSED)
    assert guarded({file: look for file, look in looks(made.path).items() if file.is_relative_to(made.path / "bert")}) > 1500
    assert commits.compact(made.path)
    manifest, everything = read_manifest(made.path), np.arange(len(made.rows))
    table = {layout.commit_table(made.path): lambda: Store(made.path, manifest).read(COMPRESSED[0].feature.of("bert"), everything)}
    assert guarded(table) >= OFFSETS


def test_every_byte_that_readers_look_at_is_guarded(made: Made) -> None:
    log = made.path / "commits" / "0.log"
    files, chance = looks(made.path), random.Random(9)
    assert set(content(made.path)) - set(files) == {log}
    assert guarded(files) > 7000
    manifest, everything = read_manifest(made.path), np.arange(len(made.rows))
    for place in damages(log, chance, 4 * OFFSETS):
        # A damaged last line is one that was torn: its shard is missing then.
        noticed = refused(lambda: Store(made.path, manifest).read(SPECS[1].feature.of("bert"), everything))
        assert noticed, f"{log}: another byte {place} is not noticed"


def test_what_readers_do_not_look_at_changes_nothing_for_them_and_is_found_by_verify(made: Made) -> None:
    whole, manifest, chance = read_all(made.path), read_manifest(made.path), random.Random(8)
    others = [file for file in made.path.rglob("*") if file.is_file() and file not in content(made.path)]
    assert {file.name for file in others if file.suffix != ".lock"} == {"zarr.json"}
    for number, file in enumerate(others):
        for place in damages(file, chance, 12):
            if number % 5 == 0 and place % 5 == 0:
                assert read_all(made.path) == whole
            if file.name == "zarr.json":
                assert list(hierarchy.differing(made.path, manifest)) == [file]
    assert verify(made.path) == []


@pytest.mark.parametrize("harm", ["truncate", "empty", "remove", "extend", "swap"])
def test_every_file_that_is_cut_short_or_gone_or_another_slots_is_noticed(made: Made, harm: str) -> None:
    for file in content(made.path):
        if harm == "extend" and file.suffix == ".log":
            continue  # reads as a torn line
        whole = file.read_bytes()
        other = file.with_name(file.name.replace("c.0", "c.3", 1))
        if harm == "swap" and (other == file or not other.exists() or other.stat().st_size != len(whole) or other.read_bytes() == whole):
            continue
        if harm == "remove":
            file.unlink()
        else:
            file.write_bytes(
                {"truncate": whole[:-1], "empty": b"", "extend": whole + b"\0", "swap": other.read_bytes() if other.exists() else b""}[harm]
            )
        with pytest.raises(StoreError):
            read_all(made.path)
        file.write_bytes(whole)
    read_all(made.path)


def test_the_reader_names_the_file_and_the_command_that_mends_it(made: Made) -> None:
    file = made.path / "bert" / "hidden.1" / "all" / "c.2.0"
    data = bytearray(file.read_bytes())
    data[100] ^= 4
    file.write_bytes(data)
    store = Store.open(made.path)
    key = SPECS[0].feature.of("bert")
    store.read(key, np.array([0]))  # other slots are untouched
    with pytest.raises(CorruptShard, match=r"hidden.1/all/c.2.0: chunk 0 fails its checksum; mend it with teacher-dump verify --repair"):
        store.read(key, np.array([6]))


def test_a_whole_store_has_no_problems(made: Made) -> None:
    assert verify(made.path) == []
    assert verify(made.path, full=False) == []
    assert repair(made.path) == ([], [], 0, (0, 0, 0))


def test_damaged_row_tables_are_reported(made: Made) -> None:
    part = made.path / "rows" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    problems = verify(made.path)
    assert [problem.file for problem in problems] == [part]
    assert not problems[0].repairs


def test_a_torn_last_line_of_the_log_is_ignored_and_cut_off_before_the_next(made: Made) -> None:
    log = made.path / "commits" / "0.log"
    whole = log.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for kept in (1, 8, 9, last // 2, last - 1):
        log.write_bytes(whole[: len(whole) - last + kept])
        store = Store.open(made.path)
        assert sorted(store.committed("bert")) == [0, 1, 2]
        with pytest.raises(MissingFeature, match="3 of 4 shards"):
            store.read(SPECS[0].feature.of("bert"), np.arange(len(made.rows)))
    with StoreWriter.open(made.path) as writer:
        assert writer.pending("bert") == [3]
        writer.commit("bert", 3, answers(Made(made.path, made.rows), 3, SPECS, writer.rows.columns.slot))
    assert log.read_bytes() == whole
    read_all(made.path)


def test_a_damaged_line_in_the_middle_is_an_error_that_repair_mends(made: Made) -> None:
    log = made.path / "commits" / "0.log"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(lines[0] + lines[1].replace(b'"shard": 1', b'"shard": 7') + b"".join(lines[2:]))
    with pytest.raises(CorruptShard, match=r"0.log: line 2 fails its checksum; mend it with: teacher-dump verify --repair"):
        read_all(made.path)
    assert [problem.file for problem in verify(made.path)] == [log]
    assert repair(made.path).left == []
    with StoreWriter.open(made.path) as writer:
        assert writer.pending("bert") == [1]


def test_a_shard_of_one_pass_cannot_stand_in_for_another_with_equal_checksums(tmp_path: Path) -> None:
    # Chunks followed by their own CRC all have one and the same CRC, so a seal over whole files would see no difference.
    made = make_store(tmp_path / "store", [[(128, 0)], [(128, 0)]], (spec("hidden.1@all", width=4),))
    folder = made.path / "bert" / "hidden.1" / "all"
    shutil.copyfile(folder / "c.0.0", folder / "c.1.0")
    with pytest.raises(CorruptShard, match="not the one that was committed"):
        read_all(made.path)


def test_an_edited_manifest_is_refused(made: Made) -> None:
    file = made.path / "manifest.json"
    tree = json.loads(file.read_text())
    tree["passes"]["bert"]["teacher"] = "xyz"
    file.write_text(json.dumps(tree, indent=1))
    with pytest.raises(StoreError, match="fails its checksum"):
        Store.open(made.path)
