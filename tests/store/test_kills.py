"""A writer that is killed at any moment loses nothing committed, and leaves nothing that counts as committed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_store import SPECS, Made, answers, make_rows, pass_info, spec

from store import FingerprintMismatch, RowWriter, Store, StoreBusy, StoreError, StoreWriter
from store.publish import replace
from store.verify import verify

HERE = Path(__file__).parent
PATHS = os.pathsep.join([str(HERE), str(HERE.parents[1])])
SLOTS = 14
MANY = [[(100, 9)]] * SLOTS

DUMP = """
import sys
from pathlib import Path
from small_store import *
from store import Row
path = Path(sys.argv[1])
with StoreWriter.open(path) as writer:
    writer.add_pass("bert", pass_info(), {"1.query.bias": np.arange(8, dtype=np.uint16)})
    print("ready", flush=True)
    made = Made(path, [Row(np.zeros(100, np.int32), None, None, None, 9, None, 0, 0, "", "", 0, 0, [])] * writer.rows.info.rows)
    for shard in writer.pending("bert"):
        writer.commit("bert", shard, answers(made, shard, SPECS, writer.rows.columns.slot))
        print(shard, flush=True)
"""

ROWS = """
import sys
from pathlib import Path
from small_store import *
print("ready", flush=True)
make_rows(Path(sys.argv[1]), [[(100, 9)]] * 400)
print("done", flush=True)
"""


def start(script: str, path: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": PATHS}
    )
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen) -> list[str]:
    """What the process had said when SIGKILL met it."""
    process.send_signal(signal.SIGKILL)
    said, _ = process.communicate(timeout=30)
    return said.split()


def check(made: Made, store: Store, shards: set[int]) -> None:
    """Every shard of ``shards`` holds what was meant for it."""
    for feature in SPECS:
        for row in np.flatnonzero(np.isin(store.rows.columns.slot, sorted(shards))):
            for array, values in store.read(feature.feature.of("bert"), np.array([row])).items():
                assert values.tobytes() == made.values[feature.key, array][row].tobytes()


@pytest.mark.slow
def test_killed_dumps_go_on_where_they_were(tmp_path: Path) -> None:
    made = make_rows(tmp_path / "store", MANY)
    for shard in range(SLOTS):
        answers(made, shard, SPECS, np.arange(SLOTS))
    chance, reported, kills = random.Random(3), set(), 0
    while len(reported) < SLOTS and kills < 8:
        process = start(DUMP, made.path)
        time.sleep(chance.uniform(0, 0.25))
        reported |= {int(shard) for shard in kill(process)}
        kills += 1
        store = Store.open(made.path)
        committed = set(store.committed("bert"))
        assert reported <= committed
        check(made, store, committed)
        reported = committed
    assert kills > 1
    with StoreWriter.open(made.path) as writer:
        assert set(writer.pending("bert")) == set(range(SLOTS)) - reported
        for shard in writer.pending("bert"):
            writer.commit("bert", shard, answers(Made(made.path, made.rows), shard, SPECS, writer.rows.columns.slot))
    assert verify(made.path) == []
    check(made, Store.open(made.path), set(range(SLOTS)))


@pytest.mark.slow
def test_killed_row_building_starts_over(tmp_path: Path) -> None:
    chance = random.Random(5)
    for number in range(3):
        path = tmp_path / f"store{number}"
        process = start(ROWS, path)
        time.sleep(chance.uniform(0.02, 0.5))
        finished = "done" in kill(process)
        committed = (path / "manifest.json").exists()
        assert committed or not finished
        if committed:
            assert verify(path) == []
        else:
            with pytest.raises(StoreError, match=r"unfinished|found nothing|something else"):
                Store.open(path)
            made = make_rows(path, MANY[:3])
            assert Store.open(path).tokens("input_ids", np.array([2])).tolist() == made.rows[2].input_ids.tolist()
            assert verify(path) == []


def test_a_second_writer_is_refused_until_the_first_ends(made: Made) -> None:
    with StoreWriter.open(made.path):
        with pytest.raises(StoreBusy, match="another process is writing"):
            StoreWriter.open(made.path)
        assert Store.open(made.path).complete("bert")  # readers do not mind
    StoreWriter.open(made.path).close()


def test_a_second_builder_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    with RowWriter(tmp_path / "store", 128):
        with pytest.raises(StoreBusy):
            RowWriter(tmp_path / "store", 128)
        assert (tmp_path / "store" / "rows").is_dir()


def test_what_a_kill_left_before_its_commit_line_is_replaced(tmp_path: Path) -> None:
    made = make_rows(tmp_path / "store", MANY[:3])
    with StoreWriter.open(made.path) as writer:
        writer.add_pass("bert", pass_info(), {})
        writer.commit("bert", 0, answers(made, 0, SPECS, writer.rows.columns.slot))
    folder = made.path / "bert" / "hidden.1" / "all"
    (folder / "c.1.0").write_bytes(b"half a shard of a run that is no more")
    (folder / ".c.1.0.0.tmp").write_bytes(b"and its temporary file")
    committed = (folder / "c.0.0").stat()
    with StoreWriter.open(made.path) as writer:
        assert writer.pending("bert") == [1, 2]
        for shard in (1, 2):
            writer.commit("bert", shard, answers(made, shard, SPECS, writer.rows.columns.slot))
        with pytest.raises(StoreError, match="committed already"):
            writer.commit("bert", 0, answers(Made(made.path, made.rows), 0, SPECS, writer.rows.columns.slot, seed=9))
    assert (folder / "c.0.0").stat() == committed
    assert not (folder / ".c.1.0.0.tmp").exists()
    assert verify(made.path) == []
    check(made, Store.open(made.path), {0, 1, 2})


def test_a_pass_without_commits_gives_way_to_another(tmp_path: Path) -> None:
    made = make_rows(tmp_path / "store", MANY[:3])
    first, other = pass_info((spec("hidden.1@all", "float16"), spec("final@first"))), pass_info()
    with StoreWriter.open(made.path) as writer:
        writer.add_pass("bert", first, {"1.query.weight": np.ones((8, 8), np.float32)})
        (made.path / "bert" / "hidden.1" / "all" / "c.0.0").write_bytes(b"a shard that never got its commit line")
        (made.path / "model" / "bert").mkdir(parents=True)
        writer.add_pass("second", first, {})
        writer.add_pass("bert", other, {"1.query.bias": np.arange(8, dtype=np.uint16)})
        assert not (made.path / "model" / "bert").exists()
        assert not (made.path / "static" / "bert" / "1.query.weight").exists()
        assert [static.name for static in Store.open(made.path).manifest.passes["bert"].statics] == ["1.query.bias"]
        for shard in writer.pending("bert"):
            writer.commit("bert", shard, answers(made, shard, SPECS, writer.rows.columns.slot))
        with pytest.raises(FingerprintMismatch, match=r"another features: .*hidden.1@all in bfloat16.*, found hidden.1@all in float16"):
            writer.add_pass("bert", first, {"1.query.bias": np.arange(8, dtype=np.uint16)})
    assert verify(made.path) == []
    check(made, Store.open(made.path), {0, 1, 2})


def test_a_pass_that_was_half_replaced_can_be_begun_again_either_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = pass_info((spec("hidden.1@all", "float16"),)), pass_info()
    statics = {"1.query.bias": np.arange(8, dtype=np.uint16)}
    for again in (0, 1):
        for step in range(100):
            made = make_rows(tmp_path / f"store{again}-{step}", MANY[:1])
            with StoreWriter.open(made.path) as writer, monkeypatch.context() as patch:
                writer.add_pass("bert", both[0], statics)
                stop_at(patch, step)
                try:
                    writer.add_pass("bert", both[1], statics)
                    stopped = False
                except Stopped:
                    stopped = True
            store = Store.open(made.path)
            assert not store.committed("bert")
            assert store.manifest.passes["bert"].features == both[0 if stopped else 1].features
            with StoreWriter.open(made.path) as writer:
                writer.add_pass("bert", both[again], statics)
                writer.commit("bert", 0, answers(made, 0, both[again].features, writer.rows.columns.slot))
            assert verify(made.path) == []
            if not stopped:
                break
        assert step > 4


class Stopped(BaseException):
    """The process ends here."""


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """End the process before its change number ``step`` to the store: a folder removed, a file put in place."""
    left = iter(range(step))

    def counted(change: Callable[..., None]) -> Callable[..., None]:
        def changed(*arguments: object) -> None:
            if next(left, None) is None:
                raise Stopped
            change(*arguments)

        return changed

    patch.setattr("shutil.rmtree", counted(shutil.rmtree))
    for module in ("hierarchy", "statics"):
        patch.setattr(f"store.{module}.replace", counted(replace))
