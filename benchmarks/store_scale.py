"""What should not grow with a store: the time to open it and the memory of a reader, as JSON.

    PYTHONPATH=. out/peers-venv/bin/python benchmarks/store_scale.py --save benchmarks/results

- open: a store of ten million rows with one feature, complete, in slots of two sizes. Its manifest, commit table and row table
  are what such a store has; so that it is made in seconds, all slots are the same (links to one file) and the values are zeros.
  Each opening is a fresh process: the import, Store.open, the first batch of 32 rows from anywhere, the batches after it (nearly
  every row is in another file, whose chunk has to be compared with its checksum), and the same batches once more.
- memory: anonymous memory of a process that has read random batches, with real stores of 1x and 16x rows; it is what the
  process itself holds, without pages of mapped files, which the kernel takes back when it needs them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import workload
from timing import ROOT, machine, save, summary
from workload import KEYS, PASS, Workload, commit_all, draw, pass_info, write_rows, writer_of

from store import Commit, FeatureKey, RowsInfo, Store, commits, feature_spec, hierarchy, layout
from store.manifest import Filled, Part
from store.parts import PART_ROWS
from store.publish import crc32c
from store.shards import CRC_BYTES, Seal, Shard, checksum

KEY = FeatureKey.parse("hidden.6@all")

READER = """
import json, sys, time
from pathlib import Path
begin = time.perf_counter()
import numpy as np
from store import FeatureKey, Store
imported = time.perf_counter()
path, keys, batches = Path(sys.argv[1]), [FeatureKey.parse(key) for key in sys.argv[2].split()], int(sys.argv[3])
store = Store.open(path)
opened = time.perf_counter()
rng = np.random.default_rng(0)
chosen = [rng.integers(0, len(store.rows), 32) for _ in range(batches)]
seconds = []
for rows in chosen + chosen:
    start = time.perf_counter()
    store.read_all(keys, rows)
    seconds.append(time.perf_counter() - start)
memory = {}
for line in open("/proc/self/smaps_rollup"):
    name, *rest = line.split()
    if name in ("Anonymous:", "Rss:"):
        memory[name[:-1].lower()] = int(rest[0]) * 1024
print(json.dumps({"import": imported - begin, "open": opened - imported, "first_batch": seconds[0],
                  "fresh_batch": float(np.median(seconds[1:batches])), "later_batch": float(np.median(seconds[batches:])), **memory}))
"""


def read(path: Path, keys: str, batches: int) -> dict[str, float]:
    """What a process of its own found."""
    command = [sys.executable, "-c", READER, str(path), keys, str(batches)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def make_huge(path: Path, rows: int, slot_tokens: int) -> int:
    """A store of so many rows, all of whose slots are alike; how many it has."""
    lengths = np.random.default_rng(0).integers(workload.SHORTEST, workload.LONGEST + 1, slot_tokens // workload.SHORTEST)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), slot_tokens, "right"))]
    with mock.patch.object(workload, "SLOT_TOKENS", slot_tokens):
        write_rows(path, Workload("SUB", lengths, {}))
    slots = -(-rows // len(lengths))
    spec = feature_spec(KEY, "float16", workload.WIDTH)
    one = Store.open(path)
    name, shard = layout.array_name(KEY, ""), one.rows.shard(spec.arrays[0], KEY.positions, 0)
    manifest = one.manifest.model_copy(update={"rows": repeated(one.manifest.rows, slots), "passes": {PASS: pass_info((spec,))}})
    hierarchy.write(path, manifest)
    seal = write_zeros(layout.slot_file(layout.array(path, PASS, name), 0), shard)
    folders = {layout.array(path, PASS, name): 2, **{layout.rows_array(path, each): 2 for each in ("numbers", "label")}}
    folders |= {layout.tokens(path, array.name): 1 for array in manifest.rows.token_arrays}
    for folder, dimensions in folders.items():
        for slot in range(1, slots):
            os.link(layout.slot_file(folder, 0, dimensions), layout.slot_file(folder, slot, dimensions))
    commits.write(path, [Commit(PASS, slot, {name: seal}) for slot in range(slots)])
    return slots


def repeated(one: RowsInfo, slots: int) -> RowsInfo:
    """Rows that are those of a slot over and over; their Parquet files, which readers of features do not touch, are not made."""
    each = max(1, PART_ROWS // one.rows)
    parts = [
        Part(file=layout.rows_part_name(number), rows=min(each, slots - first) * one.rows, crc32c=0)
        for number, first in enumerate(range(0, slots, each))
    ]
    return one.model_copy(
        update={
            "rows": one.rows * slots,
            "tokens": one.tokens * slots,
            "slots": slots,
            "filled": Filled(rows=one.filled.rows * slots, tokens=one.filled.tokens * slots, labelled=one.filled.labelled * slots),
            "splits": {name: rows * slots for name, rows in one.splits.items()},
            "parts": tuple(parts),
            "slot_crcs": {name: crcs * slots for name, crcs in one.slot_crcs.items()},
            "origins": tuple(origin.model_copy(update={"slots": slots}) for origin in one.origins),
        }
    )


def write_zeros(path: Path, shard: Shard) -> Seal:
    """A slot file of zeros that takes no room on disk."""
    last = checksum(bytes(shard.stride - CRC_BYTES))
    with path.open("wb") as file:
        for chunk in range(1, shard.chunks + 1):
            file.seek(chunk * shard.stride - CRC_BYTES)
            file.write(last)
        index = shard.index()
        file.write(index + checksum(index))
    return Seal(shard.size, crc32c(last * shard.chunks))


def opening(scratch: Path, rows: int, slot_tokens: int, rounds: int) -> dict[str, Any]:
    """Times of fresh processes on a huge store."""
    path = scratch / f"huge-{slot_tokens}"
    slots = make_huge(path, rows, slot_tokens)
    found = [read(path, str(KEY.of(PASS)), 50) for _ in range(rounds)]
    store = Store.open(path)
    return {
        "rows": len(store.rows),
        "slots": slots,
        "slot_tokens": slot_tokens,
        "manifest_bytes": layout.manifest(path).stat().st_size,
        **{
            f"{name}_seconds": summary([each[name] for each in found])
            for name in ("import", "open", "first_batch", "fresh_batch", "later_batch")
        },
        "anonymous_bytes": int(np.median([each["anonymous"] for each in found])),
    }


def memory(scratch: Path, rows: int, times: int, rounds: int) -> dict[str, Any]:
    """What readers of a store hold, and of one so many times as large, after as many batches as it takes to touch most of its files."""
    found = {}
    for many in (1, times):
        path = scratch / f"memory-{many}"
        with mock.patch.object(workload, "SLOT_TOKENS", 4096):
            drawn = draw("SUB", rows * many)
            write_rows(path, drawn)
            commit_all(writer_of(path, drawn), drawn)
        keys = " ".join(str(FeatureKey.parse(key).of(PASS)) for key in KEYS["SUB"])
        each = [read(path, keys, 400) for _ in range(rounds)]
        found[f"{many}x"] = {
            "rows": rows * many,
            "bytes": drawn.size,
            "files": 4 * len(Store.open(path).rows.slot_rows),
            "anonymous_bytes": int(np.median([one["anonymous"] for one in each])),
            "resident_bytes": int(np.median([one["rss"] for one in each])),
        }
    return found


def main() -> None:
    """Measure all of it and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=10_000_000, help="of the huge store")
    parser.add_argument("--memory-rows", type=int, default=1024, help="of the small one of the two real stores")
    parser.add_argument("--save", type=Path, help="folder for the JSON; printed without")
    options = parser.parse_args()
    made = machine()
    (ROOT / "out").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="store-scale-", dir=ROOT / "out") as name:
        scratch = Path(name)
        found = {
            "made": made,
            "open": [opening(scratch, options.rows, slot_tokens, options.rounds) for slot_tokens in (32_768, 262_144)],
            "memory": memory(scratch, options.memory_rows, 16, 3),
        }
    save(options.save, "store_scale", found)


if __name__ == "__main__":
    main()
