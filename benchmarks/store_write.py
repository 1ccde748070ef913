"""Writing features to a store beside other libraries and beside raw files, as JSON and a plot.

    PYTHONPATH=. out/peers-venv/bin/python benchmarks/store_write.py --save benchmarks/results

benchmarks/README.md says how to make the environment that has the other libraries.

Rows come shard by shard, as a teacher answers them. The reference is the least that a safe writer does: the same bytes appended to
one file an array, their crc32c, and an fsync of every file after each shard. Besides that, the store writes each shard to files
of its own, gives them their names when they are on disk, and commits them in a log. Other libraries do not wait for the disk:
their times are given as they are, and with one fsync of everything at the end.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
from peers import PEERS
from timing import ROOT, Spent, in_turn, machine, save, spent, summary, to_disk
from workload import KEYS, ROWS, Workload, commit_all, draw, write_rows, writer_of

from store import StoreWriter

OURS = "TeacherCache"
REFERENCE = "raw append + crc32c + fsync"
DURABLE = (OURS, REFERENCE)
"""Have everything on disk when they are done."""

FOR_READING = ("raw memmap", "tensorstore padded", "litdata one file")
"""Layouts that are for reading only."""


def append(folder: Path, workload: Workload, checked: bool, synced: bool) -> None:
    """A file for each array, to which the values of every shard are appended."""
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.bin").open("wb", buffering=0)) for name in workload.arrays}
        for start, stop in workload.shards:
            for name, values in workload.of_rows(start, stop).items():
                files[name].write(values.data)
                if checked:
                    files[name].write(google_crc32c.extend(0, values).to_bytes(4, "little"))
            if synced:
                for file in files.values():
                    os.fsync(file.fileno())


RAW: dict[str, Callable[[Path, Workload], None]] = {
    "raw append": partial(append, checked=False, synced=False),
    "raw append + crc32c": partial(append, checked=True, synced=False),
    REFERENCE: partial(append, checked=True, synced=True),
}
"""Bounds."""


class Writer:
    """One way to write, in a folder that is made for each round and removed after it.

    Args:
        prepare: Fills the new folder before the clock runs; ``write`` is given what it returns.
    """

    def __init__(self, folder: Path, prepare: Callable[[Path], Any], write: Callable[[Any], None]) -> None:
        self.folder = folder
        self.settling: list[Spent] = []
        """What an fsync of everything takes after each round."""
        self._prepare, self._write = prepare, write

    def before(self, _: int) -> None:
        self.folder.mkdir()
        self._prepared = self._prepare(self.folder)
        to_disk(self.folder)

    def timed(self, _: int) -> None:
        self._write(self._prepared)

    def after(self, _: int) -> None:
        """Leave nothing that the next writer would have to wait for."""
        self.settling.append(spent(lambda: to_disk(self.folder)))
        shutil.rmtree(self.folder)


def writers(workload: Workload, scratch: Path, only: list[str]) -> dict[str, Writer]:
    """All of them, the store's included."""
    rows = scratch / "rows"
    write_rows(rows, workload)

    def prepare_ours(folder: Path) -> StoreWriter:
        shutil.copytree(rows, folder, dirs_exist_ok=True)
        return writer_of(folder, workload)

    others = {**RAW, **{name: peer.write for name, peer in PEERS.items() if name not in FOR_READING}}
    found = {OURS: Writer(scratch / OURS, prepare_ours, lambda writer: commit_all(writer, workload))}
    for name, write in others.items():
        if not only or name in (REFERENCE, *only):
            found[name] = Writer(scratch / name.replace(" ", "-"), lambda folder: folder, partial(_written, write, workload))
    return found


def _written(write: Callable[[Path, Workload], None], workload: Workload, folder: Path) -> None:
    write(folder, workload)


def measure(name: str, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every writer over one workload, interleaved."""
    workload = draw(name, options.rows or ROWS[name] // 2)
    found = writers(workload, scratch, options.only)
    for writer in found.values():  # imports and first calls
        for step in (writer.before, writer.timed, writer.after):
            step(0)
        writer.settling.clear()
    timed, before, after = ({each: getattr(writer, step) for each, writer in found.items()} for step in ("timed", "before", "after"))
    times = in_turn(timed, before, after, options.rounds)
    reference = [one.wall for one in times[REFERENCE]]

    def rates(seconds: list[float]) -> dict[str, Any]:
        return {
            "mb_per_second": summary(workload.size / 1e6 / one for one in seconds),
            "over_reference": summary(bound / one for one, bound in zip(seconds, reference, strict=True)),
        }

    figures = {
        each: {
            "checksums": each == OURS or "crc32c" in each or (each in PEERS and PEERS[each].checks),
            "cpu_seconds": summary(one.cpu for one in times[each]),
            "as_it_is": rates([one.wall for one in times[each]]),
            "on_disk": rates(
                [one.wall + (0 if each in DURABLE else last.wall) for one, last in zip(times[each], writer.settling, strict=True)]
            ),
        }
        for each, writer in found.items()
    }
    return {"rows": len(workload.lengths), "bytes": workload.size, "shards": len(workload.shards), "writers": figures}


def main() -> None:
    """Measure both workloads and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int, help="of each workload; by default 2048 and 512")
    parser.add_argument("--only", nargs="+", default=[], choices=[*RAW, *PEERS], help="these writers beside the store's and the reference")
    parser.add_argument("--save", type=Path, help="folder for the JSON and the plot; printed without")
    options = parser.parse_args()
    made = machine()
    (ROOT / "out").mkdir(exist_ok=True)
    workloads = {}
    for name in KEYS:
        with tempfile.TemporaryDirectory(prefix="store-write-", dir=ROOT / "out") as scratch:
            workloads[name] = measure(name, Path(scratch), options)
        ours = workloads[name]["writers"][OURS]["as_it_is"]
        print(
            f"{name}: {ours['mb_per_second']['median']:.0f} MB/s, {ours['over_reference']['median']:.2f} of the reference", file=sys.stderr
        )
    panels = {
        f"{name}: {found['bytes'] / 1e6:.0f} MB": {
            writer: figures["on_disk"]["mb_per_second"] for writer, figures in found["writers"].items()
        }
        for name, found in workloads.items()
    }
    found = {"made": made, "rounds": options.rounds, "workloads": workloads}
    save(options.save, "store_write", found, panels, "MB/s until everything is on disk", None, OURS)


if __name__ == "__main__":
    main()
