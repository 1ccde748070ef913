"""One store for all methods with one teacher against a store for each of them, in the bytes that `teacher-dump plan` says; no teacher runs.

    python benchmarks/union.py --data FOLDER [--save benchmarks/results]

FOLDER of --data holds ``data/`` and ``teachers/`` as recipes/sst2/dump.yaml names them; of the teachers, configuration and tokenizer are
enough. A student is a last phase of a recipe in recipes/methods with those that it goes on from; those that learn from one teacher on SST-2
are compared. What each reads is what `student-train needs` prints; its store is what `teacher-dump plan --no-measure --json` says of
recipes/sst2/dump.yaml with these features in place of its own. All have the same rows, so that features of rows are spread over the tokens
that there really are.

A student is one method's if it has one beside losses on logits and labels. The store of all students is compared with the three largest
of one method together.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from timing import ROOT, machine, save

sys.path.insert(0, str(ROOT))

from store.strict import parse
from student_train.methods import METHODS
from student_train.needs import needs
from student_train.recipe import TrainRecipe

PASS = "sst2"
DUMP = ROOT / "recipes" / "sst2" / "dump.yaml"
FOLDERS = {"sst2": Path("teachers/sst2"), "mlm": Path("teachers/mlm")}
LARGEST = 3

Tree = dict[str, Any]


def main() -> None:
    """Plan every store, and print or save the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    data, folder = options.data.resolve(), options.save and options.save.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # recipes name everything from there
        for name in ("data", "teachers"):
            Path(name).symlink_to(data / name)
        program("rows", str(DUMP))
        stores, union = {}, set()
        for name, recipe in students():
            features = read(recipe)
            union.update(features)
            stores[name] = {"methods": methods_of(recipe), "features": features, **planned(*features)}
            print(f"{stores[name]['bytes_per_token']:10,.1f}  {name}", file=sys.stderr)
        found = {**machine(), **compared(stores, planned(*sorted(union))), "shipped": planned(), "stores": stores}
        os.chdir(ROOT)
    save(folder, "union", found)


def students() -> Iterator[tuple[str, Tree]]:
    """Name -> recipe of every student that learns from the pass, and from no other teacher on the task."""
    for path in sorted((ROOT / "recipes" / "methods").glob("*.yaml")):
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        phases = {phase["name"]: phase for phase in tree["phases"]}
        continued = {phase["student"].get("phase") for phase in phases.values()}
        found = {}
        for last in phases.keys() - continued:
            way = [last]
            while (earlier := phases[way[0]]["student"].get("phase")) is not None:
                way.insert(0, earlier)
            teachers = {name for one in way for data in phases[one]["data"] for name in answers(data)}
            if PASS in teachers and teachers <= FOLDERS.keys():
                found[last] = {**tree, "phases": [phases[one] for one in way]}
        for last in sorted(found):
            yield path.stem if len(found) == 1 else f"{path.stem}: {last}", found[last]


def answers(data: Tree) -> list[str]:
    """Passes that the rows of a phase are read with."""
    return [data["pass_name"]] if "pass_name" in data else list(data.get("teachers", {}).values())


def methods_of(recipe: Tree) -> list[str]:
    """What learns from the pass beside losses on logits and labels, as often as it stands in a phase; else such a loss."""
    phases = [phase for phase in recipe["phases"] if any(PASS in answers(data) for data in phase["data"])]
    used = [[method["name"] for method in phase["methods"]] for phase in phases]
    found = [name for name in METHODS if METHODS[name].kinds for _ in range(max(names.count(name) for names in used))]
    return found or used[0][:1]


def read(recipe: Tree) -> list[str]:
    """Features of the pass that a recipe reads."""
    documents = yaml.safe_load_all(needs([parse(TrainRecipe, recipe, "recipe")], FOLDERS))
    return next(list(document["features"]) for document in documents if document["pass_name"] == PASS)


@cache
def planned(*features: str) -> Tree:
    """What a dump of ``features`` holds; without any, of those of the shipped recipe."""
    changes = [f"features={json.dumps(features)}"] if features else []
    plan = json.loads(program("plan", str(DUMP), *changes, "--no-measure", "--json"))
    stored = {key: feature["bytes"] for key, feature in plan["stored"].items()}
    return {
        "stored": list(stored),
        "bytes": sum(stored.values()),
        "bytes_per_token": round(sum(stored.values()) / plan["tokens"], 1),
        "weights": plan["weights"],
        "tokens_per_row": round(plan["tokens"] / plan["rows"], 2),
    }


def compared(stores: Tree, union: Tree) -> Tree:
    """The store of all students, and those of one method."""
    alone: dict[str, int] = {}
    for store in stores.values():
        if len(store["methods"]) == 1:
            (name,) = store["methods"]
            alone[name] = max(store["bytes"], alone.get(name, 0))
    largest = sorted(alone, key=lambda name: -alone[name])[:LARGEST]
    return {
        "union": union,
        "methods": dict(sorted(alone.items())),
        "largest": largest,
        "union_over_largest": round(union["bytes"] / sum(alone[name] for name in largest), 3),
        "union_over_all": round(union["bytes"] / sum(alone.values()), 3),
    }


def program(*arguments: str) -> str:
    """What `teacher-dump` prints."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "teacher_dump.cli", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
