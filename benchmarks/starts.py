"""Objectives from different starts on SST-2: recipes/how_to_distill cut to the size of benchmarks/every_method.py, from its store.

    python benchmarks/starts.py --data FOLDER --work FOLDER --save FILE [--seeds 0 1 2] [--starts 1_2_3 ...] [--hours 2]
    python benchmarks/starts.py --save FILE --table benchmarks/results/every_sst2.json

Each objective trains for half an epoch and soft and hard labels for the other half, vanilla distillation for all of it; a random student
learns from blocks 2, 4, 6. What is done stands in --save and is not done again. The start from these blocks is recipe ``objectives`` of
every_method.py. --table prints the mean over seeds, and how far each start is from that one with the same objective: the interval is
95 % of a paired bootstrap over held-out rows, as in every_table.py.
"""

import argparse
import json
import math
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from every_method import ROOT, commit, cut, prepare, train
from every_table import compared, spread

STARTS: dict[str, dict[str, Any]] = {
    "1_4_6": {"layers": [1, 4, 6]},
    "1_2_3": {"layers": [1, 2, 3]},
    "random": {"random": {"num_hidden_layers": 3}},
}
OBJECTIVES = ("vanilla_kd", "hid_cls", "att_mse")
UNIFORM = [[1, 2], [2, 4], [3, 6]]


def main() -> None:
    """Run what is left and save the JSON after each start, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--save", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=list(STARTS))
    parser.add_argument("--hours", type=float, default=math.inf)
    parser.add_argument("--table", type=Path, help="what every_method.py has saved")
    options = parser.parse_args()
    until = time.monotonic() + options.hours * 3600
    figures = json.loads(options.save.read_text()) if options.save.exists() else {"starts": {}}
    if options.table:
        table({"2_4_6": json.loads(options.table.read_text())["runs"]["objectives"], **figures["starts"]})
        return
    if options.data is None or options.work is None:
        parser.error("to train it takes --data and --work; --table prints what is saved")
    prepare("sst2", options.data, options.work)
    for seed in options.seeds:
        for start in options.starts:
            if str(seed) in figures["starts"].get(start, {}) or time.monotonic() > until:
                continue
            done = train(options.work, f"start-{start}", recipe(start), seed)
            figures["starts"].setdefault(start, {})[str(seed)] = {**done, "commit": commit()}
            figures["versions"] = {package: version(package) for package in ("torch", "transformers")}
            options.save.write_text(json.dumps(figures, indent=1) + "\n")
            print(start, seed, {name: round(one["scores"]["accuracy"], 4) for name, one in done["students"].items()}, flush=True)


def recipe(start: str) -> dict[str, Any]:
    """The phases of all objectives from ``start``, on the store of every_method.py."""
    tree = yaml.safe_load((ROOT / "recipes" / "how_to_distill" / "train.yaml").read_text(encoding="utf-8"))
    kept = [phase for phase in tree["phases"] if phase["name"].removesuffix("_intermediate") in OBJECTIVES]
    for phase in kept:
        for data in (*phase["data"], *phase["evaluate"]):
            data |= {"store": "out/sst2/features", "pass_name": "sst2"}
    made = cut({"phases": kept}, "sst2")
    for phase in made["phases"]:
        if "phase" not in phase["student"]:
            phase["student"] = STARTS[start]
        for method in phase["methods"]:
            if start == "random" and method.get("options", {}).get("layers") == "same_as_init":
                method["options"] = {"layers": UNIFORM}
    return made


def table(starts: dict[str, Any]) -> None:
    """Print it as Markdown."""
    print("| objective | start | seeds | before | accuracy | against 2, 4, 6 |")
    print("|---|---|---|---|---|---|")
    for objective in OBJECTIVES:
        found = {start: {seed: run["students"][objective] for seed, run in seeds.items()} for start, seeds in starts.items()}
        for start, seeds in found.items():
            before = next(iter(starts[start].values()))["students"]["vanilla_kd"]["before"]["accuracy"]
            row = f"{len(seeds)} | {before:.3f} | {spread(seeds, 'accuracy')} | {compared(seeds, found['2_4_6'])}"
            print(f"| `{objective}` | {start.replace('_', ', ')} | {row} |")


if __name__ == "__main__":
    main()
