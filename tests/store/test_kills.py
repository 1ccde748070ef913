"""A writer that is killed at any moment, or out of disk, loses nothing committed and leaves nothing that counts as committed."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
import resource, sys
from pathlib import Path
from small_store import *
from store import StoreError
path, limit = Path(sys.argv[1]), int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    with StoreWriter.open(path) as writer:
        made = Made(path, [Row(np.zeros(100, np.int32), None, None, None, 9, None, 0, 0, "", "", 0, 0, [])] * writer.rows.info.rows)
        for shard in writer.shards("bert"):
            writer.commit("bert", shard, answers(made, shard, SPECS, writer.rows.columns.slot))
except StoreError as error:
    sys.exit(f"error: {error}")
"""

ROWS = """
import sys
from pathlib import Path
from small_store import *
print("ready", flush=True)
make_rows(Path(sys.argv[1]), [[(100, 9)]] * 400)
print("done", flush=True)
"""


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder without a slow disk below it, where the machine has one: what is tested then is what writers do, not how they wait."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shutil.disk_usage(shared).free < 64 << 20:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


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


@pytest.mark.drill
@pytest.mark.slow
def test_of_200_kills_with_one_and_two_writers_none_harms_what_is_committed(memory: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE.parents[1] / "benchmarks" / "kills.py"), "--kills", "200"],
        env={**os.environ, "PYTHONPATH": PATHS, "TMPDIR": str(memory)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [report[writers]["kills"] for writers in ("1 writer", "2 writers", "2 writers, stopped too")] == [90, 90, 20]
    for moment in ("with temporary files", "with files of uncommitted shards", "with claims", "after the logs were folded"):
        assert report["1 writer"][moment] + report["2 writers"][moment], "kills fall into different moments"
    assert report["2 writers, stopped too"]["writers that had lost their shard"]


def ended(path: Path, limit: int = 0) -> subprocess.CompletedProcess[str]:
    """A process that writes what is pending of ``bert``, and how it ended; files of at most ``limit`` bytes can be written."""
    command = [sys.executable, "-c", DUMP, str(path), str(limit)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": PATHS})


def goes_on(made: Made, kept: set[int]) -> None:
    """What was committed stands, nothing of the rest is left, and the same command makes the rest."""
    store = Store.open(made.path)
    assert set(store.committed("bert")) == kept
    check(made, store, kept)
    assert not list(made.path.rglob("*.tmp"))
    assert {file.name for file in (made.path / "bert").rglob("c.*.0")} == {f"c.{shard}.0" for shard in kept}
    done = ended(made.path)
    assert done.returncode == 0, done.stderr
    assert verify(made.path) == []
    check(made, Store.open(made.path), set(range(SLOTS)))


def announced(path: Path) -> Made:
    """SLOTS slots whose answers are known, and the first of them committed."""
    made = make_rows(path, MANY)
    with StoreWriter.open(path) as writer:
        writer.add_pass("bert", pass_info(), {})
        writer.commit("bert", 0, answers(made, 0, SPECS, np.arange(SLOTS)))
    for shard in range(1, SLOTS):
        answers(made, shard, SPECS, np.arange(SLOTS))
    return made


@pytest.mark.parametrize("limit", [600, 3000])
def test_a_file_that_cannot_be_written_stops_the_writer_and_harms_nothing(tmp_path: Path, limit: int) -> None:
    made = announced(tmp_path / "store")
    stopped = ended(made.path, limit)
    assert stopped.returncode == 1
    assert "Traceback" not in stopped.stderr
    what = "log" if limit > 3000 else r"c\.1\.0"
    assert re.match(rf"error: cannot write \S+{what}: File too large; make room or rights and start again", stopped.stderr)
    goes_on(made, {0})


def test_a_log_line_that_cannot_be_written_whole_is_taken_back(tmp_path: Path) -> None:
    made = announced(tmp_path / "store")
    for shard in range(1, SLOTS):  # long enough that the log is the longest file
        with StoreWriter.open(made.path) as writer:
            log = made.path / "commits" / "0.log"
            if log.stat().st_size < 4300:
                writer.commit("bert", shard, answers(Made(made.path, made.rows), shard, SPECS, np.arange(SLOTS)))
    whole = log.read_bytes()
    kept = set(Store.open(made.path).committed("bert"))
    stopped = ended(made.path, len(whole) + 100)
    assert re.match(r"error: cannot write \S+0\.log: (File too large|No space left on device); make room", stopped.stderr)
    assert log.read_bytes() == whole
    store = Store.open(made.path)
    assert set(store.committed("bert")) == kept
    assert ended(made.path).returncode == 0
    check(made, Store.open(made.path), set(range(SLOTS)))


def test_a_full_disk_stops_the_writer_and_once_there_is_room_it_goes_on(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        made = announced(disk / "store")
        filler = disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - 80_000))
        stopped = ended(made.path)
        assert stopped.returncode == 1
        assert "Traceback" not in stopped.stderr
        assert re.match(r"error: cannot write \S+: No space left on device; make room or rights and start again", stopped.stderr)
        kept = set(Store.open(made.path).committed("bert"))
        assert 0 in kept
        assert len(kept) < SLOTS
        filler.unlink()
        goes_on(made, kept)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # readers may have files of it mapped


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


def test_a_pass_that_was_half_replaced_can_be_begun_again_either_way(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = pass_info((spec("hidden.1@all", "float16"),)), pass_info()
    statics = {"1.query.bias": np.arange(8, dtype=np.uint16)}
    template = make_rows(memory / "template", MANY[:1])
    for again in (0, 1):
        for step in range(100):
            made = Made(shutil.copytree(template.path, memory / f"store{again}-{step}"), template.rows)
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
