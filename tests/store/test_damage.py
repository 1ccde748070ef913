"""No damage to what was committed goes unnoticed, and damaged shards can be made again."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_store import SPECS, Made, answers, make_store, spec

from store import CorruptShard, MissingFeature, Store, StoreError, StoreWriter
from store.verify import repair, verify


def read_all(path: Path) -> None:
    """Read whatever the store promises to hold."""
    store = Store.open(path)
    rows = np.arange(len(store.rows))
    for array in store.manifest.rows.token_arrays:
        store.tokens(array.name, rows)
    for name, info in store.manifest.passes.items():
        for feature in info.features:
            store.read(feature.feature.of(name), rows)
        store.statics(name)
    _ = store.rows.table, store.rows.columns, store.rows.label


def content(path: Path) -> list[Path]:
    return [file for file in sorted(path.rglob("*")) if file.is_file() and file.name != "zarr.json" and file.suffix != ".lock"]


def test_every_one_of_300_flipped_bits_is_noticed(made: Made) -> None:
    read_all(made.path)
    chance = random.Random(7)
    files = content(made.path)
    kinds = {file.relative_to(made.path).parts[0] for file in files}
    assert kinds == {"bert", "commits", "manifest.json", "rows", "static", "tokens"}
    for number in range(300):
        file = files[number % len(files)]
        data = bytearray(whole := file.read_bytes())
        bit = chance.randrange(len(data) * 8)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        with pytest.raises(StoreError):
            read_all(made.path)
        file.write_bytes(whole)
    read_all(made.path)


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
    assert repair(made.path) == []


def test_repair_makes_the_next_run_redo_damaged_shards_and_nothing_else(made: Made) -> None:
    before = {file: file.read_bytes() for file in content(made.path) if file.suffix != ".log"}
    flipped, gone = made.path / "bert/hidden.1/all/c.2.0", made.path / "bert/final/first/c.3.0"
    data = bytearray(flipped.read_bytes())
    data[-30] ^= 1
    flipped.write_bytes(data)
    gone.unlink()
    (made.path / "bert" / "zarr.json").write_text("{}")
    found = {(problem.file, problem.pass_name, problem.shard, problem.repairs) for problem in verify(made.path)}
    assert found == {(flipped, "bert", 2, True), (gone, "bert", 3, True), (made.path / "bert" / "zarr.json", None, None, True)}
    assert all("teacher-dump verify --repair" in str(problem) for problem in verify(made.path))
    assert repair(made.path) == []
    with StoreWriter.open(made.path) as writer:
        assert writer.pending("bert") == [2, 3]
        for shard in writer.pending("bert"):
            writer.commit("bert", shard, answers(Made(made.path, made.rows), shard, SPECS, writer.rows.columns.slot))
    assert verify(made.path) == []
    assert {file: file.read_bytes() for file in content(made.path) if file.suffix != ".log"} == before


def test_damaged_rows_and_weights_are_left_to_a_person(made: Made) -> None:
    tokens, weight = made.path / "tokens/input_ids/c.1", made.path / "static/bert/1.query.bias/c.0"
    for file in (tokens, weight):
        file.write_bytes(file.read_bytes()[:-1])
    left = repair(made.path)
    assert [(problem.file, problem.repairs) for problem in left] == [(weight.parent, False), (tokens, False)]
    assert "start the dump again" in str(left[0])
    assert "remove the folder" in str(left[1])
    with StoreWriter.open(made.path) as writer:  # the next dump
        statics = {"1.query.weight": np.arange(64, dtype=np.float32).reshape(8, 8), "1.query.bias": np.arange(8, dtype=np.uint16)}
        writer.add_pass("bert", writer.manifest.passes["bert"], statics)
        assert writer.pending("bert") == []
    assert [problem.file for problem in verify(made.path)] == [tokens]


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
    assert repair(made.path) == []
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
