"""Every method from one store: its shipped recipe cut to a common size, for each seed, in as many sittings as it takes.

    python benchmarks/every_method.py sst2|wikipedia --data FOLDER --work FOLDER --save FILE [--seeds 0 1 2] [--hours 2] [--only kd ...]

FOLDER of --data holds ``data/`` and ``teachers/``. All phases of recipes/methods/NAME.yaml are trained from the same start (three of the
teacher's blocks: the JSON has the hash of its weights), with the same batch size and learning rate, for one epoch in all, which the
phases of a method share as they share their published epochs. What is done stands in --save and is not done again; with --hours no run
is begun later than that, and one that is interrupted goes on from its last checkpoint in --work.

Methods that need their teacher at work (recipes/online) run too, on the rows of the store.

For each finished student the JSON has its held-out scores, its parameters, the bytes of features that one pass over the rows reads, the
seconds of training on this machine, and which held-out rows it got right (bits as hexadecimal digits), for paired comparisons.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from store.features import FeatureKey
from store.reader import Store
from student_train.outline import outline
from student_train.output import phase_folder
from student_train.recipe import TrainRecipe
from student_train.teacher import StoredTeacher

ROOT = Path(__file__).parents[1]
START = {"layers": [2, 4, 6]}
SIZES: dict[str, dict[str, Any]] = {
    "sst2": {
        "batch_rows": 32,
        "trainer": {"learning_rate": 5e-5, "bf16": True, "warmup_steps": 30, "lr_scheduler_type": "linear", "logging_steps": 20},
    },
    "wikipedia": {
        "batch_rows": 16,
        "trainer": {"learning_rate": 2e-4, "bf16": True, "warmup_steps": 15, "lr_scheduler_type": "linear", "logging_steps": 10},
    },
}
EPOCHS = 1.0


def main() -> None:
    """Run what is left and save the JSON after each student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(SIZES))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--save", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hours", type=float, default=1e9)
    parser.add_argument("--only", nargs="+", default=[], help="names of recipes in recipes/methods")
    options = parser.parse_args()
    until = time.monotonic() + options.hours * 3600
    figures = json.loads(options.save.read_text()) if options.save.exists() else {"recipe": options.name, "runs": {}}
    prepare(options.name, options.data, options.work)
    for seed in options.seeds:
        for name, tree in recipes(options.name):
            if (options.only and name not in options.only) or str(seed) in figures["runs"].get(name, {}):
                continue
            if time.monotonic() > until:
                return
            done = train(options.work, name, tree, seed)
            figures["runs"].setdefault(name, {})[str(seed)] = {**done, "commit": commit()}
            figures["versions"] = {package: version(package) for package in ("torch", "transformers")}
            options.save.write_text(json.dumps(figures, indent=1) + "\n")
            print(
                name,
                seed,
                {
                    leaf: round(one["scores"].get("accuracy", one["scores"].get("teacher_kl", 0)), 4)
                    for leaf, one in done["students"].items()
                },
                flush=True,
            )


def prepare(name: str, data: Path, work: Path) -> None:
    """The stores of all teachers; what is there already stays."""
    work.mkdir(parents=True, exist_ok=True)
    for folder in ("data", "teachers"):
        if not (work / folder).exists():
            (work / folder).symlink_to((data / folder).resolve())
    program(work, "teacher_dump", "run", str(ROOT / "recipes" / name / "dump.yaml"))
    if name == "sst2":
        program(work, "student_train", "run", str(ROOT / "recipes" / "sst2" / "second_teacher.yaml"))
        for further in ("second_dump", "semantic_dump"):
            program(work, "teacher_dump", "run", str(ROOT / "recipes" / "sst2" / f"{further}.yaml"))
        program(work, "teacher_dump", "rows", str(ROOT / "recipes" / "sst2" / "halves.yaml"))  # MetaDistil looks at rows of its own


def recipes(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The phases of shipped recipes that read the store of ``name`` alone, cut to the common size; the baseline first."""
    trees = {"no_teacher": {"phases": [baseline(name)]}}
    found = {path.stem: path for folder in ("online", "methods") for path in sorted((ROOT / "recipes" / folder).glob("*.yaml"))}
    for stem, path in sorted(found.items()):  # a method that learns from a store is not run online as well: it would learn the same
        phases: dict[str, dict[str, Any]] = {}
        for phase in yaml.safe_load(path.read_text(encoding="utf-8")).get("phases", []):  # none in a dump's
            earlier = {phase["student"].get("phase"), *(method.get("carry") for method in phase["methods"])} - {None}
            if {data["store"] for data in phase["data"]} == {f"out/{name}/features"} and earlier <= phases.keys():
                phases[phase["name"]] = phase
        if phases:
            trees[stem] = {"phases": list(phases.values())}
    for recipe, tree in trees.items():
        yield recipe, cut(tree, name)


def baseline(name: str) -> dict[str, Any]:
    """Labels, or masked words, alone."""
    store, of_teacher = f"out/{name}/features", {"sst2": "sst2", "wikipedia": "mlm"}[name]
    return {
        "name": "no_teacher",
        "teacher": "none",
        "data": [{"store": store, "pass_name": of_teacher}],
        "methods": [{"name": {"sst2": "task_loss", "wikipedia": "lm_loss"}[name]}],
        "evaluate": [{"store": store, "split": "dev", "pass_name": of_teacher}],
        "metrics": {"sst2": ["accuracy", "agreement"], "wikipedia": ["perplexity", "teacher_kl"]}[name],
        "epochs": 1,
    }


def cut(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """The same phases from the common start, at the common size, measured once at their end."""
    phases = {phase["name"]: dict(phase) for phase in tree["phases"]}
    for phase in phases.values():
        way = [phase]
        while (earlier := way[-1].get("student", {}).get("phase")) is not None:
            way.append(phases[earlier])
        leaves = [leaf for leaf in chains(phases) if phase["name"] in leaf]
        longest = max(sum(phases[one].get("epochs", 1) for one in leaf) for leaf in leaves)
        phase["share"] = EPOCHS * phase.get("epochs", 1) / longest
    for phase in phases.values():
        phase["epochs"] = phase.pop("share")
        if "phase" not in phase.get("student", {}):
            phase["student"] = START
        for option in ("best", "patience", "steps", "accumulation"):
            phase.pop(option, None)
        phase |= SIZES[name] | {"trainer": {**SIZES[name]["trainer"], "save_steps": 100, "eval_steps": 1_000_000}}
    return {"seed": 0, "phases": list(phases.values())}


def chains(phases: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The ways from a start to a last phase."""
    continued = {phase.get("student", {}).get("phase") for phase in phases.values()}
    found = []
    for name in phases.keys() - continued:
        way = [name]
        while (earlier := phases[way[0]].get("student", {}).get("phase")) is not None:
            way.insert(0, earlier)
        found.append(way)
    return found


def train(work: Path, name: str, tree: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train ``tree`` with ``seed`` in ``work``; its last students."""
    tree = {**tree, "output": f"out/every/{name}-{seed}", "seed": seed}
    file = work / f"{name}-{seed}.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    started = time.monotonic()
    program(work, "student_train", "run", str(file))
    seconds = time.monotonic() - started
    here = Path.cwd()
    os.chdir(work)  # recipes name their stores from there
    try:
        recipe = TrainRecipe.model_validate(tree)
        students = {}
        for way in chains({phase["name"]: phase for phase in tree["phases"]}):
            folder = phase_folder(recipe, way[-1])
            result = json.loads((folder / "result.json").read_text())
            first = json.loads((phase_folder(recipe, way[0]) / "result.json").read_text())
            students[way[-1]] = {
                "start": first["start"][:16],
                "before": first["before"],
                "scores": result["after"],
                "steps": {one: json.loads((phase_folder(recipe, one) / "result.json").read_text())["steps"] for one in way},
                "bytes_read": sum(bytes_read(recipe, one) for one in way),
                **measured(folder / "student"),
            }
    finally:
        os.chdir(here)
    return {"seconds": round(seconds, 1), "students": students}


def bytes_read(recipe: TrainRecipe, phase: str) -> int:
    """Bytes of features that one pass over the training rows of ``phase`` reads."""
    one, total = outline(recipe, recipe.phase(phase)), 0.0
    for data in one.phase.data:
        store = Store.open(data.store)
        rows = store.manifest.rows.splits[data.split]
        for name, passes in data.answers.items():
            if keys := one.method_keys.get(name):
                teacher = StoredTeacher(store, passes, keys)
                total += sum(unit_bytes(store, key) * rows for key in teacher._read.values())
    return round(total)


def unit_bytes(store: Store, key: FeatureKey) -> float:
    """Bytes of a stored feature in an average row."""
    rows = store.manifest.rows
    units = 1 if key.per_row else (rows.tokens if key.positions == "all" else sum(rows.filled.labelled)) / rows.rows
    return store.spec(key).unit_bytes * units


def measured(student: Path) -> dict[str, Any]:
    """Parameters of an exported classifier, and which rows of SST-2's dev split it gets right, through transformers alone."""
    if "ForSequenceClassification" not in (student / "config.json").read_text():
        from transformers import AutoModel

        return {"parameters": sum(weight.numel() for weight in AutoModel.from_pretrained(student).parameters())}
    tokenizer = AutoTokenizer.from_pretrained(student)
    model = AutoModelForSequenceClassification.from_pretrained(student).eval()
    table = pq.read_table("data/tasks/sst2_dev.parquet").to_pydict()
    right = []
    with torch.no_grad():
        for start in range(0, len(table["label"]), 64):
            batch = tokenizer(table["sentence1"][start : start + 64], padding=True, truncation=True, max_length=64, return_tensors="pt")
            right += (model(**batch).logits.argmax(-1) == torch.tensor(table["label"][start : start + 64])).tolist()
    return {"parameters": sum(weight.numel() for weight in model.parameters()), "right": np.packbits(right).tobytes().hex()}


def program(work: Path, package: str, *arguments: str) -> None:
    """Run one of the programs in ``work``; a run that was interrupted goes on."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", f"{package}.cli", *arguments], cwd=work, env=environment, stdout=sys.stderr, check=True)


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
