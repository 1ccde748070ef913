"""Writers that are killed again and again: JSON on standard output.

    python benchmarks/kills.py [--kills 1000] [--seed 0] > benchmarks/results/kills.json

One writer, and then two over one store, commit shards as a dump does, and each is met by SIGKILL at a random moment and started
again, store after store. After each kill everything that was ever committed must still be, with the same files; shards that a
writer had reported as done must be committed; each finished store must be, file by file and row by row, that of a writer that
nobody disturbed. Writers fold their commit logs whenever they can, so that kills meet that too. At last, of two writers, half
are not killed but stopped for longer than claims hold, and go on after another has taken their shards. Exits with 1 at the first harm.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from store import (
    FeatureKey,
    ModelShape,
    PassInfo,
    Provenance,
    Row,
    RowWriter,
    Store,
    StoreBusy,
    StoreWriter,
    Task,
    Wiring,
    feature_spec,
    leases,
    writer,
)
from store.provenance import provenance
from store.verify import verify

SLOTS = 40
SLOT_TOKENS = 512
SHAPE = ModelShape(
    family="bert", head="masked_lm", layers=2, width=64, heads=2, kv_heads=2, head_width=32, vocab=1000, causal=False,
    pre_norm=False, windows=(None, None),
)  # fmt: skip
SPECS = (
    feature_spec(FeatureKey.parse("hidden.1@all"), "bfloat16", 64),
    feature_spec(FeatureKey.parse("hidden.2@first"), "float32", 64),
    feature_spec(FeatureKey.parse("lm_logits@labels:top8"), "float16", 1000),
)
MADE = Provenance(command=("kills",), versions={}, created="2026-01-01T00:00:00Z")
INFO = PassInfo(
    teacher="t", model="m", dtype="float32", shape=SHAPE, wiring=Wiring(), requested=(), features=SPECS, statics=(), shipped=False,
    made=MADE,
)  # fmt: skip
STATICS = {"1.query.bias": np.arange(64, dtype=np.float32)}
LOST = 3
"""Exit code of a writer whose shard another has taken over."""
LONGEST = 0.12
"""Seconds until a kill, at most: some shards."""


def make_rows(path: Path) -> None:
    """SLOTS slots of rows of different lengths."""
    draw = np.random.default_rng(0)
    with RowWriter(path, SLOT_TOKENS) as rows:
        for number in range(SLOTS):
            lengths = [*draw.integers(1, 60, 4).tolist(), 257]  # no two groups fit in a slot
            rows.append_group(
                [Row(np.full(n, number, np.int32), None, None, None, n // 5, None, number, 0, "", "", number, 0, []) for n in lengths]
            )
        rows.finish(
            copies=1, bucket=16, objective="plain", task=Task(kind="none"), pad_id=0, tokenizer="t", corpus="c", building="b", options={},
            made=MADE,
        )  # fmt: skip


def answers(store: StoreWriter, shard: int) -> dict[FeatureKey, dict[str, np.ndarray]]:
    """What the teacher says, the same whoever asks."""
    draw = np.random.default_rng(shard)
    arrays: dict[FeatureKey, dict[str, np.ndarray]] = {}
    for spec in SPECS:
        units = int(store.rows.slot_units(spec.feature.positions)[shard])
        for array in spec.arrays:
            dtype = "uint16" if array.dtype == "bfloat16" else array.dtype
            values = draw.integers(0, 1000, (units, array.width)).astype(dtype)
            arrays.setdefault(spec.feature, {})[array.name] = values
    return arrays


def write(path: Path, said: int | None = None) -> None:
    """Answer until the pass is complete, as a dump does; what is done is told to the pipe ``said``."""
    with StoreWriter.open(path) as store:
        store.add_pass("bert", INFO, STATICS)
        while store.pending("bert"):
            for shard in store.shards("bert"):
                store.commit("bert", shard, answers(store, shard))
                if said is not None:
                    os.write(said, bytes([shard]))
            time.sleep(0.005)


class Drill:
    """One store after the other, written by processes that are killed."""

    def __init__(self, folder: Path, processes: int, stops: bool, chance: random.Random) -> None:
        self.seen: Counter[str] = Counter()
        self._folder = folder
        self._processes = processes
        self._stops = stops
        self._chance = chance
        self._children: dict[int, int] = {}
        self._whole = folder / "undisturbed"
        make_rows(self._whole)
        write(self._whole)

    def run(self, kills: int) -> None:
        """So many kills, and then a store that is finished in peace."""
        left, number = kills, 0
        while left:
            path = self._folder / f"store-{number}"
            make_rows(path)
            number += 1
            known: dict[Path, tuple[int, ...]] = {}
            while left and len(Store.open(path).committed("bert")) < SLOTS:
                while len(self._children) < self._processes:
                    self._start(path)
                time.sleep(self._chance.uniform(0, LONGEST))
                victim = self._chance.choice(list(self._children))
                if self._stops and self._chance.random() < 0.5:
                    os.kill(victim, signal.SIGSTOP)
                    time.sleep(self._chance.uniform(leases.EXPIRES, 3 * leases.EXPIRES))
                    os.kill(victim, signal.SIGCONT)
                    self.seen["stops"] += 1
                    known = self._check(path, known, set())
                    continue
                os.kill(victim, signal.SIGKILL)
                killed, reported = self._end(victim)
                left -= killed
                self.seen["kills"] += killed
                known = self._check(path, known, reported)
            for child in list(self._children):
                self._end(child)
            write(path)
            self._check(path, known, set(range(SLOTS)))
            self._compare(path)
            self.seen["stores"] += 1

    def _start(self, path: Path) -> None:
        reader, said = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            try:
                write(path, said)
                os._exit(0)
            except StoreBusy:
                os._exit(LOST if self._stops else 1)
            except BaseException as error:
                print(f"writer: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
        os.close(said)
        self._children[child] = reader

    def _end(self, child: int) -> tuple[bool, set[int]]:
        """Wait for a writer; whether it was killed, and the shards that it said were done."""
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) in (0, LOST), "a writer stopped with an error"
        self.seen["writers that had lost their shard"] += os.WIFEXITED(status) and os.WEXITSTATUS(status) == LOST
        with os.fdopen(self._children.pop(child), "rb") as pipe:
            return os.WIFSIGNALED(status), set(pipe.read())

    def _check(self, path: Path, known: dict[Path, tuple[int, ...]], reported: set[int]) -> dict[Path, tuple[int, ...]]:
        """Nothing committed is lost or changed; the committed files as they are now."""
        if "bert" not in Store.open(path).manifest.passes:
            assert not known
            return {}
        committed = Store.open(path).committed("bert")
        assert reported <= committed.keys(), f"{path}: shards {reported - committed.keys()} were done, and are lost"
        now = {}
        for commit in committed.values():
            for array in commit.files:
                file = path / "bert" / array / f"c.{commit.shard}.0"
                about = file.stat()
                now[file] = (about.st_ino, about.st_mtime_ns, about.st_size)
                if file not in known:
                    assert file.read_bytes() == (self._whole / file.relative_to(path)).read_bytes(), f"{file} holds something else"
        assert known.items() <= now.items(), f"{path}: what was committed was lost or changed: {known.items() - now.items()}"
        self._note(path, set(now))
        return now

    def _note(self, path: Path, committed: set[Path]) -> None:
        """What a kill had left half done; with two writers some of it is the other's work."""
        files = [file for file in (path / "bert").rglob("*") if file.is_file() and file.name != "zarr.json"]
        logs = [log.read_bytes() for log in (path / "commits").glob("*.log")]
        self.seen["with temporary files"] += any(file.name.endswith(".tmp") for file in files)
        self.seen["with files of uncommitted shards"] += any(file.name.startswith("c.") for file in set(files) - committed)
        self.seen["with claims"] += any(claim.suffix != ".lock" for claim in (path / "claims").glob("*/*"))
        self.seen["with a torn line"] += any(log and not log.endswith(b"\n") for log in logs)
        self.seen["after the logs were folded"] += (path / "commits" / "table.log").exists()

    def _compare(self, path: Path) -> None:
        """A finished store is that of a writer that nobody disturbed."""
        assert verify(path) == []
        one, other = Store.open(path), Store.open(self._whole)
        assert one.complete("bert")
        rows = np.arange(len(one.rows))
        for spec in SPECS:
            key = spec.feature.of("bert")
            for name, values in one.read(key, rows).items():
                assert values.tobytes() == other.read(key, rows)[name].tobytes(), f"{path}: {key} differs"
        left = [*([] if self._stops else path.rglob("*.tmp")), *(path / "claims" / "bert").iterdir()]
        assert not left, f"clutter is left: {left}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=1000, help="nearly half of them with one writer, the rest with two")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    writer.FOLD = 1
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, processes, stops in (("1 writer", 1, False), ("2 writers", 2, False), ("2 writers, stopped too", 2, True)):
            (Path(folder) / name).mkdir()
            if stops:
                leases.EXPIRES, leases.RENEW = 0.1, 0.02
            drill = Drill(Path(folder) / name, processes, stops, random.Random(f"{options.seed} {name}"))
            start = time.perf_counter()
            drill.run(options.kills // 10 if stops else options.kills * 9 // 20)
            found[name] = {**drill.seen, "seconds": round(time.perf_counter() - start, 1)}
    report = {"made": provenance(sys.argv).model_dump(), "lost": 0, "changed": 0, "shards of a store": SLOTS, **found}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
