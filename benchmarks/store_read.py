"""Shuffled batches out of a store beside other libraries and beside memory, as JSON and a plot.

    PYTHONPATH=. out/peers-venv/bin/python benchmarks/store_read.py --save benchmarks/results

benchmarks/README.md says how to make the environment that has the other libraries.

- read: milliseconds a batch of 32 rows, CPU and wall, and the ratio to a gather from memory (the rows in one anonymous array a
  feature, copied slice by slice), for every reader over the same batches, interleaved. Every reader puts a batch into the same
  buffer. All files were put into the page cache in the same way, and read once before.
- first epoch: the same store opened anew, when every chunk is compared with its checksum, beside the epochs after it.
- ``--chunks``: the store's reader with other inner chunks and slots instead.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from peers import PEERS
from timing import ROOT, Run, Spent, against, in_turn, machine, save, settle, spent, summary
from workload import KEYS, PASS, ROWS, Ints, Read, Workload, array_name, commit_all, draw, gather, write_rows, writer_of

from store import FeatureKey, Store

OURS = "TeacherCache"
MEMORY = "memory"
WARM_SECONDS = 4.0
"""A reader that takes longer for all rows does not get to see all of them before it is timed; a few page faults are nothing to it."""


def open_ours(folder: Path, workload: Workload) -> Read:
    """The store's reader; the buffer is the one that all readers use."""
    store = Store.open(folder)
    keys = [FeatureKey.parse(key).of(PASS) for key in KEYS[workload.name]]

    def read(rows: Ints) -> list[Any]:
        found = store.read_all(keys, rows, lambda size: workload.buffer[:size])
        return [found[key][name] for key in keys for name in found[key]]

    return read


def make_store(folder: Path, workload: Workload) -> None:
    """A store with the workload's rows and features."""
    write_rows(folder, workload)
    commit_all(writer_of(folder, workload), workload)
    keys = [FeatureKey.parse(key) for key in KEYS[workload.name]]
    stored = Store.open(folder)
    names = [array_name(key, array.name) for key in keys for array in stored.spec(key.of(PASS)).arrays]
    assert names == list(workload.arrays)


def readers(folder: Path, workload: Workload, options: argparse.Namespace) -> dict[str, Read]:
    """Every reader, its files made and put into the page cache."""
    found = {MEMORY: gather(list(workload.arrays.values()), workload)}
    for name, (write, opened, _) in {OURS: (make_store, open_ours, True), **PEERS}.items():
        if options.only and name not in options.only:
            continue
        place = folder / name.replace(" ", "-")
        if name != OURS:
            place.mkdir()
        write(place, workload)
        settle(place, options.reread)
        found[name] = opened(place, workload)
        progress(f"{workload.name}: {name} written")
    return found


def check(name: str, read: Read, workload: Workload, batches: list[Ints]) -> None:
    """Every byte that a reader gives must be the right one."""
    for rows in batches:
        for array, values, wanted in zip(workload.arrays, read(rows), workload.expected(rows).values(), strict=True):
            if values.ndim == 3:  # padded
                values = [row[:length] for row, length in zip(values, workload.lengths[rows], strict=True)]
                same = b"".join(row.tobytes() for row in values) == wanted.tobytes()
            else:
                same = values.dtype == wanted.dtype and values.tobytes() == wanted.tobytes()
            if not same:
                raise SystemExit(f"{name} reads other values of {array} than were written")


def warm(read: Read, batches: list[Ints]) -> None:
    """Touch every page of a fast reader."""
    end = time.perf_counter() + WARM_SECONDS
    for rows in batches:
        read(rows)
        if time.perf_counter() > end:
            break


def interleaved(found: dict[str, Read], batches: list[Ints], each: int, rounds: int) -> dict[str, list[Spent]]:
    """Every reader over the same ``each`` batches of a round, and over two more before them that are not timed."""

    def run(read: Read, first: int, stop: int) -> Run:
        def batches_of(number: int) -> None:
            for place in range(first, stop):
                read(batches[(number * (each + 2) + place) % len(batches)])

        return batches_of

    timed, before = ({name: run(read, *span) for name, read in found.items()} for span in ((2, each + 2), (0, 2)))
    return in_turn(timed, rounds, before)


def read_all(folder: Path, workload: Workload, batches: list[Ints], options: argparse.Namespace) -> dict[str, Any]:
    """The interleaved comparison of all readers."""
    found = readers(folder, workload, options)
    for name, read in found.items():
        check(name, read, workload, batches[:2])
        warm(read, batches)
    times = interleaved(found, batches, options.batches, options.rounds)
    cpu, wall = against(times, MEMORY, "cpu"), against(times, MEMORY, "wall")
    return {
        name: {
            "cpu_ms": summary(1e3 * one.cpu / options.batches for one in each),
            "wall_ms": summary(1e3 * one.wall / options.batches for one in each),
            "cpu_over_memory": cpu[name],
            "wall_over_memory": wall[name],
            "checksums": name == OURS or (name in PEERS and PEERS[name].checks),
        }
        for name, each in times.items()
    }


def first_epoch(folder: Path, workload: Workload, batches: list[Ints], rounds: int) -> dict[str, Any]:
    """All rows in random order through a store just opened, and once more; beside raw memory maps just opened."""

    def epoch(read: Read) -> None:
        for rows in batches:
            read(rows)

    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        raw, ours = (
            opened(folder / name.replace(" ", "-"), workload)
            for name, opened in (("raw memmap", PEERS["raw memmap"].opened), (OURS, open_ours))
        )
        memory = gather(list(workload.arrays.values()), workload)
        for name, read in (("memory", memory), ("raw memmap, first", raw), ("raw memmap, later", raw), ("first", ours), ("later", ours)):
            found.setdefault(name, []).append(spent(lambda read=read: epoch(read)).cpu)
    return {
        "bytes": workload.size,
        "cpu_seconds": {name: summary(times) for name, times in found.items()},
        "first_over_later": summary(one / other for one, other in zip(found["first"], found["later"], strict=True)),
    }


@contextmanager
def layout_of(chunk: int, slot_tokens: int) -> Iterator[None]:
    """Rows that are built with another inner chunk and slot."""
    with mock.patch("store.building.token_chunk", return_value=chunk), mock.patch("workload.SLOT_TOKENS", slot_tokens):
        yield


def chunks(name: str, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The store's reader over stores of other inner chunks, and of small slots (so that nearly every row is in another file)."""
    workload = draw(name, options.rows or ROWS[name])
    batches = list(workload.batches(32, 0))
    found = {MEMORY: gather(list(workload.arrays.values()), workload)}
    for chunk, slot in ((128, 32_768), (512, 32_768), (1024, 32_768), (2048, 32_768), (1024, 4096)):
        sized = Workload(workload.name, workload.lengths, workload.arrays)
        with layout_of(chunk, slot):
            place = scratch / f"{chunk}-{slot}"
            make_store(place, sized)
        settle(place, options.reread)
        found[f"chunk {chunk}, slot {slot}"] = open_ours(place, workload)
    for each, read in found.items():
        check(each, read, workload, batches[:2])
        warm(read, batches)
    times = interleaved(found, batches, options.batches, options.rounds)
    return against(times, MEMORY, "cpu")


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(name: str, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one workload."""
    workload = draw(name, options.rows or ROWS[name])
    batches = list(workload.batches(options.batch_rows, 0))
    found: dict[str, Any] = {
        "rows": len(workload.lengths),
        "tokens": int(workload.first[-1]),
        "bytes": workload.size,
        "batch_rows": options.batch_rows,
    }
    found["readers"] = read_all(scratch, workload, batches, options)
    progress(f"{name}: {OURS} {found['readers'][OURS]['cpu_over_memory']['median']} of memory")
    if not options.only or "raw memmap" in options.only:
        found["epochs"] = first_epoch(scratch, workload, batches, max(3, options.rounds // 4))
    return found


def main() -> None:
    """Measure both workloads and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batches", type=int, default=8, help="read by each reader in a round")
    parser.add_argument("--batch-rows", type=int, default=32)
    parser.add_argument("--rows", type=int, help="of each workload; by default 4096 and 1024")
    parser.add_argument("--only", nargs="+", default=[], choices=[OURS, *PEERS], help="these readers beside memory")
    parser.add_argument("--chunks", action="store_true", help="compare inner chunks and slots instead of readers")
    parser.add_argument("--reread", action="store_true", help="drop the files from memory and read them again before")
    parser.add_argument("--save", type=Path, help="folder for the JSON and the plot; printed without")
    options = parser.parse_args()
    made = machine()
    (ROOT / "out").mkdir(exist_ok=True)
    measured = chunks if options.chunks else measure
    workloads = {}
    for name in KEYS:
        with tempfile.TemporaryDirectory(prefix="store-read-", dir=ROOT / "out") as scratch:
            workloads[name] = measured(name, Path(scratch), options)
    found = {"made": made, "rounds": options.rounds, "batches": options.batches, "reread": options.reread, "workloads": workloads}
    if options.chunks:
        save(options.save, "store_chunks", found)
        return
    panels = {
        f"{name}: {each['bytes'] / 1e6:.0f} MB, batches of {options.batch_rows} rows": {
            reader: figures["cpu_over_memory"] for reader, figures in each["readers"].items()
        }
        for name, each in workloads.items()
    }
    save(
        options.save,
        "store_read_again" if options.reread else "store_read",
        found,
        panels,
        "CPU time of a shuffled batch, as a multiple of a gather from memory",
        1.0,
        OURS,
    )


if __name__ == "__main__":
    main()
