"""A reader goes on when another process drops, repairs or makes again what it reads."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_store import MADE, SPECS, Made, answers

from store import MissingFeature, Store, StoreWriter
from store.drop import drop
from store.verify import repair, verify

HERE = Path(__file__).parent
PATHS = os.pathsep.join([str(HERE), str(HERE.parents[1])])

READER = """
import sys, zlib
import numpy as np
from pathlib import Path
from store import Store, StoreError

store = Store.open(Path(sys.argv[1]), mapped=sys.argv[2] == "mapped")
rows = np.arange(len(store.rows))
keys = [feature.feature.of("bert") for feature in store.manifest.passes["bert"].features]

def everything():
    found = store.read_all(keys, rows)
    return zlib.crc32(b"".join(values.tobytes() for key in keys for values in found[key].values()))

for _ in sys.stdin:
    try:
        print(everything(), flush=True)
    except StoreError as error:
        print(type(error).__name__, flush=True)
"""


class Reader:
    """Another process that reads all of a store whenever it is asked to."""

    def __init__(self, path: Path, how: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", READER, str(path), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": PATHS},
        )

    def look(self) -> str:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("look\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def end(self) -> int:
        """Its exit status: below nothing where a signal ended it."""
        self._process.communicate(timeout=60)
        return self._process.returncode


def lose(path: Path, slot: int) -> None:
    """Let a repair take a shard back."""
    (path / f"bert/final/first/c.{slot}.0").unlink()
    assert repair(path).dropped == 1


def make_again(made: Made, seed: int) -> None:
    with StoreWriter.open(made.path) as writer:
        for shard in writer.pending("bert"):
            writer.commit("bert", shard, answers(Made(made.path, made.rows), shard, SPECS, writer.rows.columns.slot, seed))


@pytest.mark.parametrize("how", ["mapped", "pieces"])
def test_a_reader_keeps_what_it_has_open_whatever_others_do(made: Made, how: str) -> None:
    reader = Reader(made.path, how)
    whole = reader.look()
    assert whole.isdigit()
    lose(made.path, 1)
    assert reader.look() == whole
    make_again(made, seed=5)  # other answers than before
    assert reader.look() == whole
    lose(made.path, 2)
    make_again(made, seed=0)
    drop(made.path, ["bert/hidden.1@all"], MADE, lambda name, info: info)
    assert reader.look() == whole
    drop(made.path, ["bert"], MADE, lambda name, info: info)
    assert not (made.path / "bert").exists()
    assert reader.look() == whole
    assert reader.end() == 0
    assert verify(made.path) == []


def test_a_reader_that_had_not_opened_a_shard_reads_what_was_made_again(made: Made) -> None:
    key, rows = SPECS[0].feature.of("bert"), np.arange(len(made.rows))
    store = Store.open(made.path)
    store.read(key, np.array([0]))
    lose(made.path, 2)
    make_again(made, seed=5)
    again = Store.open(made.path).read(key, rows)[""]
    assert store.read(key, rows)[""].tobytes() == again.tobytes()
    assert again.tobytes() != b"".join(values.tobytes() for values in made.values[SPECS[0].key, ""])


def test_a_reader_waits_for_a_shard_that_was_taken_back_until_it_looks_again(made: Made) -> None:
    key, rows = SPECS[0].feature.of("bert"), np.arange(len(made.rows))
    store = Store.open(made.path)
    lose(made.path, 2)
    with pytest.raises(MissingFeature, match=r"3 of 4 shards, not \[2\]; start its dump again to go on"):
        store.read(key, rows)
    make_again(made, seed=0)
    store.refresh()
    assert store.read(key, rows)[""].tobytes() == b"".join(values.tobytes() for values in made.values[SPECS[0].key, ""])


def test_a_reader_that_had_not_opened_a_dropped_feature_says_so(made: Made) -> None:
    store = Store.open(made.path)
    store.read(SPECS[1].feature.of("bert"), np.array([0]))
    drop(made.path, ["bert/hidden.1@all"], MADE, lambda name, info: info)
    for reader in (store, Store.open(made.path)):
        with pytest.raises(MissingFeature, match=r"has no bert/hidden.1@all"):
            reader.read(SPECS[0].feature.of("bert"), np.array([0]))
