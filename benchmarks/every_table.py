"""The table of benchmarks/every_method.py, and paired comparisons on SST-2.

    python benchmarks/every_table.py benchmarks/results/every_sst2.json [--against kd]

For each student: mean and standard deviation over seeds, parameters, bytes of features that one pass over the rows reads, seconds of
training. On SST-2 each is compared with --against by a paired bootstrap: held-out rows are drawn anew 10,000 times, the same
for both, and the difference of the mean accuracies over the seeds that both have is taken; 95 % of the differences lie in the interval.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
ROWS = 872
"""Of SST-2's dev split."""


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--against", default="kd")
    options = parser.parse_args()
    figures = json.loads(options.file.read_text())
    found = students(figures["runs"])
    metric, other = ("accuracy", "agreement") if figures["recipe"] == "sst2" else ("perplexity", "teacher_kl")
    reference = next((seeds for name, seeds in found.items() if name.split("/")[0] == options.against), {})
    print(f"| student | start | seeds | {metric} | {other} | against {options.against} | parameters | bytes read | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, seeds in sorted(found.items(), key=lambda item: -np.mean([one["scores"].get(metric, 0) for one in item[1].values()])):
        one, seconds = next(iter(seeds.values())), np.mean([each["seconds"] for each in seeds.values()])
        scores = f"{spread(seeds, metric)} | {spread(seeds, other)} | {compared(seeds, reference)}"
        sizes = f"{one['parameters'] / 1e6:.1f} M | {one['bytes_read'] / 1e6:,.1f} MB | {seconds:.0f}"
        print(f"| `{name}` | {one['start'][:8]} | {len(seeds)} | {scores} | {sizes} |")


def students(runs: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Recipe/phase -> seed -> what is known of the student; the phase is left out where a recipe has one last phase."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for recipe, seeds in runs.items():
        for seed, run in seeds.items():
            for phase, student in run["students"].items():
                name = recipe if len(run["students"]) == 1 else f"{recipe}/{phase}"
                found.setdefault(name, {})[seed] = {**student, "seconds": run["seconds"] / len(run["students"])}
    return found


def spread(seeds: dict[str, dict[str, Any]], metric: str) -> str:
    """Mean and standard deviation over seeds."""
    values = [one["scores"][metric] for one in seeds.values() if metric in one["scores"]]
    if not values:
        return ""
    return f"{np.mean(values):.4f}" + (f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else "")


def compared(seeds: dict[str, dict[str, Any]], reference: dict[str, dict[str, Any]]) -> str:
    """Difference of mean accuracies from ``reference`` and its 95 % interval, over the seeds that both have."""
    both = sorted(seeds.keys() & reference.keys())
    if not both or "right" not in seeds[both[0]] or seeds is reference:
        return ""
    difference_R = np.mean([right(seeds[seed]) - right(reference[seed]) for seed in both], axis=0)
    draws = np.random.default_rng(0).integers(ROWS, size=(DRAWS, ROWS))
    low, high = np.quantile(difference_R[draws].mean(1), [0.025, 0.975])
    return f"{difference_R.mean():+.4f} ({low:+.4f} to {high:+.4f})"


def right(student: dict[str, Any]) -> NDArray[np.float64]:
    """[ROWS] 1 where it got a held-out row right."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(student["right"]), np.uint8))
    return bits[:ROWS].astype(np.float64)


if __name__ == "__main__":
    main()
