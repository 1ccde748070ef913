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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from peers import PEERS
from timing import ROOT, Compared, Pair, Run, in_pairs, machine, ratio, save, settle, spent, summary
from workload import KEYS, PASS, ROWS, Ints, Read, Workload, array_name, commit_all, draw, gather, write_rows, writer_of

from store import FeatureKey, Store

OURS = "TeacherCache"
MEMORY = "memory"
WARM_SECONDS = 1.0
"""A reader that takes longer for all rows does not get to see all of them before it is timed; a few page faults are nothing to it."""

SLOW_SECONDS = 5e-3
"""A reader that takes longer for a batch reads a quarter as many in a round."""

ROUNDS_SETTLED = 7
"""Rounds until all files are put into other parts of memory."""

SIZES = ((128, 32_768), (512, 32_768), (1024, 32_768), (2048, 32_768), (1024, 4096))
"""Tokens of inner chunks and slots to compare; with the small slots nearly every row of a batch is in another file."""


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


def write_all(folder: Path, workload: Workload, only: list[str]) -> dict[str, Callable[[Path, Workload], Read]]:
    """Every reader's files, in a folder of its own; how they are opened."""
    found = {}
    for name, (write, opened, _) in {OURS: (make_store, open_ours, True), **PEERS}.items():
        if not only or name in only:
            if name != OURS:
                place(folder, name).mkdir()
            write(place(folder, name), workload)
            found[name] = opened
    progress(f"{workload.name}: written")
    return found


def place(folder: Path, name: str) -> Path:
    """Where a reader's files are."""
    return folder / name.replace(" ", "-")


def settled(folder: Path, workload: Workload, opened: dict[str, Callable[[Path, Workload], Read]], reread: bool) -> dict[str, Read]:
    """Every reader, newly opened, and the bound, all in parts of memory that they did not have before."""
    found = {MEMORY: gather([array.copy() for array in workload.arrays.values()], workload)}
    for name, opener in opened.items():
        settle(place(folder, name), reread)
        found[name] = opener(place(folder, name), workload)
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


def warm(read: Read, batches: list[Ints]) -> float:
    """Touch every page of a fast reader; how many seconds a batch took in the end."""
    end = time.perf_counter() + WARM_SECONDS
    for rows in batches:
        start = time.perf_counter()
        read(rows)
        took = time.perf_counter() - start
        if start + took > end:
            break
    return took


def paired(
    make: Callable[[], dict[str, Read]], workload: Workload, batches: list[Ints], options: argparse.Namespace
) -> dict[str, list[Pair]]:
    """Every reader over the batches of each round (slow ones over the first of them), and over two more before that are not timed.

    ``make`` gives the readers; it is asked for them anew every ROUNDS_SETTLED rounds.
    """

    def run(read: Read, first: int, count: int) -> Run:
        def of_round(number: int) -> None:
            for each in range(first, first + count):
                read(batches[(number * (options.batches + 2) + each) % len(batches)])

        return of_round

    pairs: dict[str, list[Pair]] = {}
    for start in range(0, options.rounds, ROUNDS_SETTLED):
        found = make()
        compared: dict[str, Compared] = {}
        counts: dict[str, int] = {}
        for name, read in found.items():
            check(name, read, workload, batches[:2])
            count = options.batches if warm(read, batches) < SLOW_SECONDS else max(1, options.batches // 4)
            compared[name] = Compared(run(read, 2, count), run(read, 0, 2), run(found[MEMORY], 2, count), run(found[MEMORY], 0, 2))
            counts[name] = count
        for name, more in in_pairs(compared, range(start, min(start + ROUNDS_SETTLED, options.rounds))).items():
            pairs.setdefault(name, []).extend(Pair(one.each(counts[name]), reference.each(counts[name])) for one, reference in more)
    return pairs


def read_all(folder: Path, workload: Workload, batches: list[Ints], options: argparse.Namespace) -> dict[str, Any]:
    """The comparison of all readers."""
    opened = write_all(folder, workload, options.only)
    found = paired(lambda: settled(folder, workload, opened, options.reread), workload, batches, options)
    return {
        name: {
            "cpu_ms": summary(1e3 * one.cpu for one, _ in pairs),
            "wall_ms": summary(1e3 * one.wall for one, _ in pairs),
            "cpu_over_memory": ratio(pairs, "cpu"),
            "wall_over_memory": ratio(pairs, "wall"),
            "checksums": name == OURS or (name in PEERS and PEERS[name].checks),
        }
        for name, pairs in found.items()
    }


def first_epoch(folder: Path, workload: Workload, batches: list[Ints], rounds: int) -> dict[str, Any]:
    """All rows in random order through a store just opened, and once more; beside raw memory maps just opened."""

    def epoch(read: Read) -> None:
        for rows in batches:
            read(rows)

    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        raw, ours = (
            opened(place(folder, name), workload) for name, opened in (("raw memmap", PEERS["raw memmap"].opened), (OURS, open_ours))
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
    sizes = {f"chunk {chunk}, slot {slot}": (chunk, slot) for chunk, slot in SIZES}
    for each, (chunk, slot) in sizes.items():
        with layout_of(chunk, slot):
            make_store(place(scratch, each), Workload(workload.name, workload.lengths, workload.arrays))
    opened = dict.fromkeys(sizes, open_ours)
    found = paired(lambda: settled(scratch, workload, opened, options.reread), workload, batches, options)
    return {each: ratio(pairs, "cpu") for each, pairs in found.items()}


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
    parser.add_argument("--batches", type=int, default=16, help="read by each reader in a round")
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
