"""What a writer asks of the system, in which order: nothing gets a name before its bytes are durable, and nothing is committed
before its names are."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from small_store import SPECS, make_rows

from store import Store, layout

HERE = Path(__file__).parent
PATHS = os.pathsep.join([str(HERE), str(HERE.parents[1])])
SLOTS = 4
CALLS = "openat,write,pwrite64,writev,ftruncate,fsync,fdatasync,link,linkat,unlink,unlinkat,rename,renameat,renameat2"

WRITE = """
import sys
from pathlib import Path
from small_store import *
path = Path(sys.argv[1])
with StoreWriter.open(path) as writer:
    writer.add_pass("bert", pass_info(), {"1.query.bias": np.arange(8, dtype=np.uint16)})
    made = Made(path, [type("Row", (), {"input_ids": np.zeros(100), "labelled": 9})()] * writer.rows.info.rows)
    for shard in writer.shards("bert"):
        writer.commit("bert", shard, answers(made, shard, SPECS, writer.rows.columns.slot))
from store import commits
commits.compact(path)
"""


class Call(NamedTuple):
    """One system call that worked, in the order in which they ended."""

    name: str
    paths: tuple[str, ...]
    """Inside the store; of a descriptor the file that it is of."""


def traced(path: Path, output: Path) -> list[Call]:
    command = [
        "strace", "-f", "-y", "-qq", "-s", "16", "-o", str(output), "-e", f"trace={CALLS}", sys.executable, "-c", WRITE, str(path),
    ]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": PATHS}, capture_output=True, text=True, timeout=120)
    if "ptrace" in done.stderr and done.returncode:
        pytest.skip(f"this machine does not let processes be traced: {done.stderr.strip()[:200]}")
    assert done.returncode == 0, done.stderr
    begun: dict[str, str] = {}
    calls = []
    for line in output.read_text(errors="replace").splitlines():
        thread, _, text = line.partition(" ")
        text = text.strip()
        if text.endswith("<unfinished ...>"):
            begun[thread] = text.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>", text):
            text = begun.pop(thread) + text[resumed.end() :]
        if (match := re.match(r"(\w+)\((.*)\)\s+= (-?\d+)", text)) is None or match[3] == "-1":
            continue
        inside = re.findall(rf'(?:"|\d<){re.escape(str(path))}(/[^">]*|)(?:"|>)', match[2])
        if inside:
            calls.append(Call(match[1], tuple(name.lstrip("/") for name in inside)))
    return calls


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Call]]:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    folder = tmp_path_factory.mktemp("traced").resolve()
    made = make_rows(folder / "store", [[(100, 9)]] * SLOTS)
    return made.path, traced(made.path, folder / "calls")


def places(calls: list[Call], names: set[str], *paths: str) -> list[int]:
    """Where in ``calls`` one of ``names`` was asked for, of just these files."""
    return [place for place, call in enumerate(calls) if call.name in names and call.paths == paths]


WRITES = {"write", "pwrite64", "writev"}
SYNCS = {"fsync", "fdatasync"}
LINKS = {"link", "linkat"}
RENAMES = {"rename", "renameat", "renameat2"}


def test_every_committed_file_is_durable_before_it_has_its_name_and_has_its_name_before_it_counts(calls: tuple[Path, list[Call]]) -> None:
    path, seen = calls
    lines = places(seen, WRITES, "commits/0.log")
    durable = places(seen, SYNCS, "commits/0.log")
    assert len(lines) == len(durable) == SLOTS, "one line for each shard, and each is made durable"
    assert all(line < sync for line, sync in zip(lines, durable, strict=True))
    assert all(sync < line for sync, line in zip(durable, lines[1:], strict=False))
    committed = Store.open(path).committed("bert")
    assert len(committed) == SLOTS
    order = sorted(committed, key=lambda shard: places(seen, LINKS, *_link("bert/hidden.1/all", shard))[0])
    for line, shard in zip(lines, order, strict=True):
        assert len(committed[shard].files) == sum(len(spec.arrays) for spec in SPECS)
        for array in committed[shard].files:
            temporary, name = _link(f"bert/{array}", shard)
            written, synced = places(seen, WRITES, temporary), places(seen, SYNCS, temporary)
            (linked,) = places(seen, LINKS, temporary, name)
            named = [place for place in places(seen, SYNCS, f"bert/{array}") if place > linked]
            assert written, "the data goes to a temporary file"
            assert written[-1] < synced[0] < linked < named[0] < line, f"{name}: data, fsync, link, fsync of the folder, commit line"
            assert not places(seen, WRITES, name), "nothing is ever written under a name that counts"
            assert not [place for place, call in enumerate(seen) if call.name in RENAMES and name in call.paths]


def _link(folder: str, shard: int) -> tuple[str, str]:
    return f"{folder}/.c.{shard}.0.0.tmp", f"{folder}/c.{shard}.0"


@pytest.mark.parametrize("name", [layout.MANIFEST, "commits/table.log", "static/bert/1.query.bias/c.0"])
def test_what_is_replaced_is_durable_before_and_its_folder_after(calls: tuple[Path, list[Call]], name: str) -> None:
    _, seen = calls
    folder, _, file = name.rpartition("/")
    temporary = f"{folder}/.{file}.0.tmp".lstrip("/")
    (renamed,) = places(seen, RENAMES, temporary, name)
    written, synced = places(seen, WRITES, temporary), places(seen, SYNCS, temporary)
    assert written[-1] < synced[0] < renamed < next(place for place in places(seen, SYNCS, folder) if place > renamed)


def test_logs_go_once_the_table_that_holds_them_is_durable(calls: tuple[Path, list[Call]]) -> None:
    _, seen = calls
    (renamed,) = places(seen, RENAMES, "commits/.table.log.0.tmp", "commits/table.log")
    durable = [place for place in places(seen, SYNCS, "commits") if place > renamed]
    (gone,) = places(seen, {"unlink", "unlinkat"}, "commits/0.log")
    assert durable[0] < gone


def test_the_log_itself_has_a_durable_name_before_its_first_line_counts(calls: tuple[Path, list[Call]]) -> None:
    _, seen = calls
    first = places(seen, {"openat"}, "commits/0.log")
    lines = places(seen, WRITES, "commits/0.log")
    assert [place for place in places(seen, SYNCS, "commits") if place < lines[0]], "the folder is synced before"
    assert first


def test_weights_and_manifest_are_there_before_the_first_shard(calls: tuple[Path, list[Call]]) -> None:
    _, seen = calls
    (manifest,) = places(seen, RENAMES, f".{layout.MANIFEST}.0.tmp", layout.MANIFEST)
    (weight,) = places(seen, RENAMES, "static/bert/1.query.bias/.c.0.0.tmp", "static/bert/1.query.bias/c.0")
    first = min(place for place, call in enumerate(seen) if call.name in LINKS and call.paths[0].endswith(".tmp"))
    assert weight < manifest < first
