"""Fair timing on a machine that does other things too: all candidates in turn, round after round, compared within a round."""

import gc
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
WRITE_BYTES = 32 << 20
DRAWS = 2000

PACKAGES = ("numpy", "zarr", "tensorstore", "h5py", "pyarrow", "datasets", "safetensors", "litdata", "array_record")

Action = Callable[[], object]
Run = Callable[[int], object]
"""Given the number of the round."""


class Spent(NamedTuple):
    """Seconds of one measurement."""

    wall: float
    cpu: float
    """Of all threads of the process."""

    def each(self, count: int) -> "Spent":
        """For one of so many."""
        return Spent(self.wall / count, self.cpu / count)


def spent(action: Action) -> Spent:
    """What ``action`` takes."""
    cpu, wall = time.process_time(), time.perf_counter()
    action()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


class Pair(NamedTuple):
    """One measurement, and the reference just before it."""

    one: Spent
    reference: Spent


class Compared(NamedTuple):
    """What is timed, what the reference does for it, and what each does untimed first."""

    timed: Run
    before: Run
    reference: Run
    reference_before: Run


def in_pairs(candidates: Mapping[str, Compared], rounds: Iterable[int]) -> dict[str, list[Pair]]:
    """Each candidate once a round, in random order, and the reference before each of them: what disturbs one disturbs the other.

    What is done untimed is there so that none pays for what another one left in the processor's caches.
    """
    found: dict[str, list[Pair]] = {name: [] for name in candidates}
    for number, name in shuffled(list(candidates), rounds):
        timed, before, reference, reference_before = candidates[name]
        reference_before(number)
        base = spent(partial(reference, number))
        before(number)
        found[name].append(Pair(spent(partial(timed, number)), base))
    return found


def in_turn(timed: Mapping[str, Run], before: Mapping[str, Run], after: Mapping[str, Run], rounds: int) -> dict[str, list[Spent]]:
    """Each candidate once a round, in random order; what ``before`` and ``after`` hold is not timed."""
    found: dict[str, list[Spent]] = {name: [] for name in timed}
    for number, name in shuffled(list(timed), range(rounds)):
        before[name](number)
        found[name].append(spent(partial(timed[name], number)))
        after[name](number)
    return found


def shuffled(names: list[str], rounds: Iterable[int]) -> Iterator[tuple[int, str]]:
    """Number of the round and name, so that none always follows the same one."""
    gc.collect()
    gc.freeze()
    for number in rounds:
        for name in np.random.default_rng(number).permutation(names).tolist():
            gc.collect()
            yield number, name
    gc.unfreeze()


def summary(values: Iterable[float], digits: int = 4) -> dict[str, float]:
    """Median, and its 95 % confidence interval by bootstrap."""
    each = np.array(list(values))
    draws = np.random.default_rng(0).choice(each, (DRAWS, len(each)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {"median": round(float(np.median(each)), digits), "low": round(float(low), digits), "high": round(float(high), digits)}


def ratio(pairs: Iterable[Pair], of: str) -> dict[str, float]:
    """Time (``wall`` or ``cpu``) over that of the reference."""
    return summary(getattr(one, of) / getattr(reference, of) for one, reference in pairs)


def settle(folder: Path, reread: bool) -> None:
    """Put the files of ``folder`` into the page cache in the same way, whoever wrote them.

    The kernel caches a file in units of 4 KB to 2 MB, depending on how it was written or read, and that alone can make a factor
    of two. So each file is written anew in large pieces, which gives large units. With ``reread`` it is then dropped from memory
    and read from start to end, as after a restart: then the units depend on its length, and many small files do worse. Each call
    puts the files into other parts of memory, which on a virtual machine are not all equally fast.
    """
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        again = path.with_name(f".{path.name}.again")
        data = memoryview(path.read_bytes())
        with again.open("wb", buffering=0) as file:
            for start in range(0, len(data), WRITE_BYTES):
                file.write(data[start : start + WRITE_BYTES])
            os.fsync(file.fileno())
            if reread:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        again.replace(path)
        with path.open("rb", buffering=0) as file:
            while file.read(WRITE_BYTES):
                pass


def to_disk(folder: Path) -> None:
    """Wait until everything below ``folder`` is on disk."""
    for path in (folder, *folder.rglob("*")):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def machine() -> dict[str, Any]:
    """Where and with what a benchmark ran."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "commit": head,
        "python": platform.python_version(),
        "versions": versions,
        "cpus": os.cpu_count(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
    }


Panels = Mapping[str, Mapping[str, dict[str, float]]]
"""Title -> name -> summary."""


def save(
    folder: Path | None,
    name: str,
    found: dict[str, Any],
    panels: Panels | None = None,
    label: str = "",
    mark: float | None = None,
    ours: str = "",
) -> None:
    """Write ``found`` as JSON, and ``panels`` as a plot, into ``folder``; without one, print the JSON."""
    text = json.dumps(found, indent=1)
    if folder is None:
        print(text)
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(text + "\n")
    if panels:
        bars(folder / f"{name}.png", panels, label, mark, ours)


def bars(path: Path, panels: Panels, label: str, mark: float | None, ours: str) -> None:
    """Draw one panel of horizontal bars (with confidence intervals, logarithmic where they differ much) for each entry of ``panels``."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(7 * len(panels), 0.42 * max(map(len, panels.values())) + 1.6), squeeze=False)
    for axis, (title, figures) in zip(axes[0], panels.items(), strict=True):
        order = sorted(figures, key=lambda name: -figures[name]["median"])
        medians = [figures[name]["median"] for name in order]
        errors = [
            [figures[name]["median"] - figures[name]["low"] for name in order],
            [figures[name]["high"] - figures[name]["median"] for name in order],
        ]
        colours = ["#c2410c" if name.startswith(ours) else "#64748b" for name in order]
        axis.barh(order, medians, xerr=errors, color=colours, ecolor="black", capsize=2)
        if max(medians) > 20 * min(medians):
            axis.set_xscale("log")
        axis.margins(x=0.15)
        for place, (median, high) in enumerate(zip(medians, (figures[name]["high"] for name in order), strict=True)):
            axis.text(high, place, f"  {median:.0f}" if median >= 100 else f"  {median:.3g}", va="center", fontsize=8)
        if mark is not None:
            axis.axvline(mark, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(title)
        axis.set_xlabel(label)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
