"""Whole dumps that are killed, stopped, starved of disk and failed by the file system: JSON on standard output.

    make drills        or: PYTHONPATH=tests/teacher_dump python benchmarks/drills.py [--kills 200] [--seed 0] [--save FILE]

Jobs of `teacher-dump run` with 1, 2 and 3 ranks, two at once over one store, with teachers of their own or one that is sharded by
ZeRO-3, FSDP or tensor parallelism, are met by SIGKILL (of one rank, or of a whole job as when a node goes) at random moments and
started again in another way, store after store, some of them on a slow disk. After each kill the store must open, everything that was
ever committed must be there unchanged, and the ranks that held a part of the same teacher must end by themselves. Each finished store
must be that of a dump that nobody disturbed: bit for bit, or row for row within 1e-5 where the teacher was sharded.
Then the same with ranks that are stopped for longer than their claims hold, with system calls that fail (strace), and on a file
system that is full at a random byte. Exits with an error at the first harm. tests/teacher_dump/ has the drill itself; CI runs a few kills.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from disks import fill, make_room, on_small_disk
from fault_drill import SHARDED, WHOLE, Drill, make_recipe
from jobs import start
from tiny_dump import stored_bytes

from store.provenance import provenance
from store.verify import verify
from teacher_dump import dump

PARTS: dict[str, tuple[Sequence[Any], bool, bool, float]] = {
    "ranks with a teacher of their own": (WHOLE, False, False, 0.4),
    "sharded teachers": (SHARDED, False, False, 0.35),
    "ranks stopped for longer than their claims hold": (WHOLE, True, False, 0.1),
    "a file system that fails": ((*WHOLE, *SHARDED), False, True, 0.15),
}
"""Jobs, whether ranks are stopped and system calls fail, and the share of the kills."""

DISK = 16 << 20


def drilled(folder: Path, kills: int, part: str, seed: int) -> dict[str, Any]:
    """What a part of the drill met."""
    launches, stops, errors, share = PARTS[part]
    folder.mkdir()
    drill = Drill(folder, make_recipe(folder), random.Random(f"{seed} {part}"), launches, stops, errors)
    begun = time.perf_counter()
    drill.run(max(1, round(kills * share)))
    found: dict[str, Any] = {**drill.seen, "kills of": dict(drill.met), "largest difference": drill.difference}
    if drill.ended:
        found["seconds until the other ranks had ended"] = {
            "median": round(statistics.median(drill.ended), 2),
            "most": round(max(drill.ended), 2),
        }
    return {**found, "seconds": round(time.perf_counter() - begun, 1)}


def full_disks(folder: Path, times: int, seed: int) -> dict[str, Any]:
    """What dumps met on a file system that is full at a random byte."""
    folder.mkdir()
    recipe, report, begun = make_recipe(folder), folder / "report.json", time.perf_counter()

    def never_checks(rank: int) -> None:
        dump.check_disk = lambda path, needed: None  # as if the room had been there when it was looked at

    def body(disk: Path) -> None:
        chance, seen = random.Random(f"{seed} full"), Counter[str]()
        job = start(recipe, 1, folder / "whole", [f"store={disk / 'whole'}"], prepare=never_checks)
        assert job.codes() == [0], job.said()
        about = os.statvfs(disk)
        needed = (about.f_blocks - about.f_bfree) * about.f_frsize
        for number in range(times):
            store, ranks = disk / f"store-{number}", chance.randint(1, 3)
            fill(disk, leave=chance.randrange(needed))
            job = start(recipe, ranks, folder / f"full-{number}", [f"store={store}"], prepare=never_checks)
            for code, rank in zip(job.codes(), job.ranks, strict=True):
                assert code in (0, 2), job.said()
                assert code == 0 or ("No space left on device" in rank.text and str(store) in rank.text), job.said()
                assert "Traceback" not in rank.text, job.said()
                seen["ranks that named the full disk"] += code == 2
            seen["runs on a full disk"] += 1
            if (store / "manifest.json").exists():
                assert verify(store) == []
            make_room(disk)
            job = start(recipe, chance.randint(1, 3), folder / f"again-{number}", [f"store={store}"], prepare=never_checks)
            assert set(job.codes()) == {0}, job.said()
            assert verify(store) == []
            assert stored_bytes(store) == stored_bytes(disk / "whole")
            seen["stores equal to the bit"] += 1
            shutil.rmtree(store)
        report.write_text(json.dumps(seen))

    on_small_disk(folder / "disk", DISK, body)
    return {**json.loads(report.read_text()), "seconds": round(time.perf_counter() - begun, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="file for the JSON, which is printed all the same")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    report: dict[str, Any] = {"made": provenance(sys.argv).model_dump(), "lost": 0, "changed": 0}
    with tempfile.TemporaryDirectory() as name:
        for number, part in enumerate(PARTS):
            report[part] = drilled(Path(name) / str(number), options.kills, part, options.seed)
            print(part, report[part], file=sys.stderr)
        report["a full disk"] = full_disks(Path(name) / "full", max(1, options.kills // 10), options.seed)
    report["kills"] = sum(report[part]["kills"] for part in PARTS)
    text = json.dumps(report, indent=1)
    print(text)
    if options.save is not None:
        options.save.write_text(text + "\n")


if __name__ == "__main__":
    main()
