"""Repair makes the next run redo what is damaged and removes what nothing refers to, and nothing else, killed or not."""

import contextlib
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import forge
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forge import read_all
from small_store import SPECS, Made, answers, content

from store import Store, StoreBusy, StoreWriter, commits
from store.publish import file_crc32c
from store.verify import repair, verify


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
    assert {problem.file for problem in verify(made.path, full=False)} == {gone, made.path / "bert" / "zarr.json"}
    done = repair(made.path)
    assert (len(done.mended), done.left, done.dropped) == (3, [], 2)
    assert done.freed.files == 2 * sum(len(feature.arrays) for feature in SPECS) - 1
    assert done.freed.freed > 0
    assert not list((made.path / "bert").rglob("c.[23].0"))
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
    left = repair(made.path).left
    assert [(problem.file, problem.repairs) for problem in left] == [(tokens, False), (weight.parent, False)]
    assert "remove the folder" in str(left[0])
    assert "start the dump again" in str(left[1])
    with StoreWriter.open(made.path) as writer:  # the next dump
        statics = {"1.query.weight": np.arange(64, dtype=np.float32).reshape(8, 8), "1.query.bias": np.arange(8, dtype=np.uint16)}
        writer.add_pass("bert", writer.manifest.passes["bert"], statics)
        assert writer.pending("bert") == []
    assert [problem.file for problem in verify(made.path)] == [tokens]


@pytest.mark.parametrize(
    ("column", "values"),
    [("split", ["dev"] * 9), ("copy", [1] * 9), ("length", [3] * 9), ("label", [0.5] * 9)],
    ids=lambda value: str(value)[:9],
)
def test_a_row_part_that_says_other_than_the_arrays_is_found(made: Made, column: str, values: list) -> None:
    file = made.path / "rows" / "part-00000.parquet"
    table = pq.read_table(file)
    field = table.schema.field(column)
    pq.write_table(table.set_column(table.schema.get_field_index(column), field, pa.array(values, field.type)), file)
    forge.manifest(made.path, lambda tree: tree["rows"]["parts"][0].update(crc32c=file_crc32c(file)))
    (problem,) = verify(made.path)
    assert (problem.file, problem.repairs) == (file, False)
    assert re.search(rf"{column} of row \d is .*, but .* in the array that readers use", problem.what)
    assert verify(made.path, full=False) == []


def test_progress_counts_the_committed_bytes(made: Made) -> None:
    seen: list[tuple[int, int]] = []
    verify(made.path, progress=lambda done, total: seen.append((done, total)))
    written = sum(seal.size for commit in Store.open(made.path).committed("bert").values() for seal in commit.files.values())
    assert {total for _, total in seen} == {written} == {sum(done for done, _ in seen)}


def litter(path: Path) -> list[Path]:
    """Put what killed commands and dropped features leave; the files of it."""
    features = path / "bert" / "hidden.1"
    (features / "last").mkdir()
    (path / "bert" / "hidden.7" / "all").mkdir(parents=True)
    (path / "model" / "gone").mkdir(parents=True)
    files = [
        features / "all" / ".c.1.0.0.tmp",
        features / "all" / "c.77.0",
        features / "last" / "c.0.0",
        path / "bert" / "hidden.7" / "all" / "c.0.0",
        path / "model" / "gone" / "config.json",
        path / "rows" / "part-00009.parquet",
        path / "tokens" / "input_ids" / "c.9",
        path / "static" / "bert" / "1.query.bias" / ".c.0.0.tmp",
    ]
    for file in files:
        file.write_bytes(bytes(5000))
    return files


def test_what_nothing_refers_to_is_removed_and_what_is_somebodys_stays(made: Made) -> None:
    before, clean = read_all(made.path), sorted(made.path.rglob("*"))
    mine = [made.path / "notes.txt", made.path / "bert" / "notes.txt", made.path / "rows" / "notes.txt", made.path / "tokens" / "mine"]
    for file in mine:
        file.write_text("mine")
    files = litter(made.path)
    assert verify(made.path) == []
    done = repair(made.path)
    assert done[:3] == ([], [], 0)
    assert done.freed.files == len(files)
    assert done.freed.freed >= 5000 * len(files)
    assert not [file for file in files if file.exists()]
    assert set(made.path.rglob("*")) - set(clean) <= {*mine, made.path / "model"} | set(made.path.rglob("*.lock"))
    assert all(file.read_text() == "mine" for file in mine)
    assert read_all(made.path) == before
    assert repair(made.path) == ([], [], 0, (0, 0, 0))


def test_files_that_another_store_shares_free_nothing(made: Made, tmp_path: Path) -> None:
    stray = made.path / "bert" / "hidden.1" / "all" / "c.77.0"
    stray.write_bytes(bytes(5000))
    os.link(stray, tmp_path / "shared")
    freed = repair(made.path).freed
    assert (freed.files, freed.freed) == (1, 0)
    assert freed.shared >= 5000
    assert (tmp_path / "shared").read_bytes() == bytes(5000)


def test_a_store_that_is_written_to_is_not_repaired(made: Made) -> None:
    files = litter(made.path)
    with StoreWriter.open(made.path), pytest.raises(StoreBusy):
        repair(made.path)
    assert all(file.exists() for file in files)


def killed(action: Callable[[], object], step: int) -> bool:
    """Do something in a process that SIGKILL meets before its change number ``step`` to the disk; whether it did."""
    if (process := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            left = iter(range(step))

            def hook(event: str, arguments: tuple) -> None:
                writes = event in ("os.remove", "os.rename", "os.rmdir", "os.link", "os.mkdir", "os.truncate")
                if (writes or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))) and next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            action()
            os._exit(0)
        os._exit(1)
    status = os.waitpid(process, 0)[1]
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def state(path: Path) -> tuple[dict[Path, bytes], dict]:
    """All that counts of a store."""
    kept = [file for file in path.rglob("*") if file.is_file() and file.parent.name != "commits"]
    return {file.relative_to(path): file.read_bytes() for file in kept}, commits.replay(path)


def test_a_repair_that_is_killed_anywhere_is_finished_by_the_next(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)  # power stays on
    flipped = made.path / "bert/hidden.1/all/c.2.0"
    flipped.write_bytes(flipped.read_bytes()[:-30] + b"x" + flipped.read_bytes()[-29:])
    (made.path / "bert/final/first/c.3.0").unlink()
    (made.path / "bert" / "zarr.json").write_text("{}")
    litter(made.path)
    key, intact = SPECS[0].feature.of("bert"), np.flatnonzero(Store.open(made.path).rows.columns.slot < 2)
    whole = Store.open(made.path).read(key, intact)[""].tobytes()
    undisturbed = shutil.copytree(made.path, tmp_path / "undisturbed")
    repair(undisturbed)
    for step in count():
        path = shutil.copytree(made.path, tmp_path / f"killed-{step}")
        again = killed(partial(repair, path), step)
        store = Store.open(path)
        assert store.read(key, intact)[""].tobytes() == whole
        assert {0, 1} <= set(store.committed("bert"))
        repair(path)
        assert state(path) == state(undisturbed)
        shutil.rmtree(path)
        if not again:
            break
    assert step > 20


@pytest.mark.slow
def test_repairs_killed_at_random_lose_nothing_intact(made: Made) -> None:
    chance = random.Random(11)
    intact = {slot for slot in range(4)}
    for number in range(12):
        victim = chance.choice(sorted(intact)) if len(intact) > 1 else None
        if victim is not None and number % 3 == 0:
            (made.path / f"bert/final/first/c.{victim}.0").unlink()
            intact.discard(victim)
        if (process := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                repair(made.path)
            os._exit(0)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert intact <= set(Store.open(made.path).committed("bert"))
    repair(made.path)
    assert set(Store.open(made.path).committed("bert")) == intact
    with StoreWriter.open(made.path) as writer:
        for shard in writer.pending("bert"):
            writer.commit("bert", shard, answers(Made(made.path, made.rows), shard, SPECS, writer.rows.columns.slot))
    assert verify(made.path) == []
