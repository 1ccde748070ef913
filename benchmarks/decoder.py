"""A decoder pair: recipes/decoder trained, dumped and distilled in each form, in as many sittings as it takes.

    python benchmarks/decoder.py --data FOLDER --work FOLDER --save FILE [--seeds 0 1 2] [--hours 2] [--limit 8000] [--teacher-epochs 4] \
        [--sizes hidden_size=192 num_hidden_layers=4] [--cpu]

FOLDER of --data holds ``data/`` and ``teachers/``. The teacher is trained on words alone; then the phases of recipes/decoder/train.yaml and
online.yaml are trained for each seed from the same start, on the same rows in the same order. What is done stands in --save and is not
done again; with --hours no run is begun later than that, and one that is interrupted goes on from its last checkpoint in --work.

For each student the JSON has, on held-out rows: its loss (nats a word) and perplexity, KL(teacher || student), calibration error of the
likeliest word, agreement with the teacher's, and the chance that a word drawn from it stands when the teacher checks it; and the bytes a
token of what it learned from, and the seconds of training on this machine. "teacher" has the scores of the teacher itself.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from store.reader import Store

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "decoder"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
TEACHER = "out/decoder/teacher/teacher/student"
FORMS = ("top64", "draw50", "top12draw20", "top6band12")
"""Phases that learn from sparse answers. Each form has a pass of its own here, so that it is stored whatever the teacher's width: all of
them together follow from what a narrow head multiplies, in fewer bytes."""


def main() -> None:
    """Run what is left and save the JSON after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--save", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hours", type=float, default=1e9)
    parser.add_argument("--limit", type=int, help="paragraphs to learn from; all by default")
    parser.add_argument("--held-out", type=int, help="paragraphs to measure on; all by default")
    parser.add_argument("--teacher-epochs", type=float, default=4.0)
    parser.add_argument("--steps", type=int, help="steps of each student and of the teacher, instead of epochs")
    parser.add_argument("--rows", type=int, default=64, help="rows of a step")
    parser.add_argument("--sizes", nargs="*", default=[], metavar="NAME=VALUE", help="changes to the teacher's configuration")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, also where there is a GPU")
    parser.add_argument("--only", nargs="+", default=[], help="names of phases")
    options = parser.parse_args()
    until = time.monotonic() + options.hours * 3600
    settings = {name: getattr(options, name) for name in ("limit", "held_out", "teacher_epochs", "steps", "rows", "sizes")}
    figures = json.loads(options.save.read_text()) if options.save.exists() else {"settings": settings, "runs": {}}
    if figures["settings"] != settings:
        sys.exit(f"{options.save} was made with {figures['settings']}, this run has {settings}; give another file")
    figures["teacher"] = prepare(options)
    for seed in options.seeds:
        for phase in phases(options, seed):
            name = phase["name"]
            if (options.only and name not in options.only) or str(seed) in figures["runs"].get(name, {}):
                continue
            if time.monotonic() > until:
                return
            figures["runs"].setdefault(name, {})[str(seed)] = {**train(options.work, phase, seed), "commit": commit()}
            figures["versions"] = {package: version(package) for package in ("torch", "transformers")}
            figures["bytes_a_token"] = {name: form_bytes(options.work, name) for name in ("exact", *FORMS)}
            options.save.parent.mkdir(parents=True, exist_ok=True)
            options.save.write_text(json.dumps(figures, indent=1) + "\n")
            print(name, seed, {key: round(value, 4) for key, value in figures["runs"][name][str(seed)]["scores"].items()}, flush=True)


def prepare(options: argparse.Namespace) -> dict[str, float]:
    """Rows, the teacher and both of its passes; what is there already stays. The teacher's own scores."""
    work: Path = options.work
    base = work / "out" / "decoder" / "base"
    base.mkdir(parents=True, exist_ok=True)
    for folder in ("data", "teachers"):
        if not (work / folder).exists():
            (work / folder).symlink_to((options.data / folder).resolve())
    if not (base / "config.json").exists():
        for name in TOKENIZER:
            shutil.copyfile(work / "teachers" / "mlm" / name, base / name)
        config = json.loads((RECIPES / "config.json").read_text())
        config |= {name: int(value) for name, _, value in (size.partition("=") for size in options.sizes)}
        (base / "config.json").write_text(json.dumps(config))
    limits = enumerate((options.limit, options.held_out))
    few = [f"rows.sources.{number}.limit={limit}" for number, limit in limits if limit]
    device = ["device=cpu"] if options.cpu else []
    program(work, "teacher_dump", "rows", str(RECIPES / "rows.yaml"), *few)
    tree = load("teacher.yaml")
    shared(tree["phases"][0], options)
    if not options.steps:
        tree["phases"][0]["epochs"] = options.teacher_epochs
    run(work, "teacher", tree)
    config = json.loads((work / TEACHER / "config.json").read_text())
    blocks = f"ship_layers={list(range(2, config['num_hidden_layers'] + 1, 2))}"
    program(work, "teacher_dump", "run", str(RECIPES / "dump.yaml"), *few, *device, blocks)
    for form in FORMS:
        one = [f"pass_name={form}", f"features=[lm_logits@labels:{form}]"]
        program(work, "teacher_dump", "run", str(RECIPES / "words.yaml"), *one, *few, *device, blocks)
    scores: dict[str, float] = json.loads((work / TEACHER / ".." / "result.json").resolve().read_text())["after"]
    return scores


def phases(options: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """The students' phases, each with the same share of text and steps."""
    found = [*load("train.yaml")["phases"], *load("online.yaml")["phases"]]
    for phase in found:
        phase["student"] = {"layers": "every 2", "source": TEACHER}
        phase["evaluate_rows"] = None
        if phase["name"] in FORMS:
            phase["data"], phase["evaluate"] = (
                [{**data[0], "pass_name": [phase["name"], "teacher"]}] for data in (phase["data"], phase["evaluate"])
            )
        shared(phase, options)
    return found


def shared(phase: dict[str, Any], options: argparse.Namespace) -> None:
    """Settings of this benchmark in ``phase``."""
    phase["batch_rows"] = options.rows
    phase["trainer"] |= {"save_steps": 200, "eval_steps": 1_000_000, "save_total_limit": 1}
    if options.cpu:
        phase["trainer"] |= {"use_cpu": True}
    if options.steps:
        phase["epochs"] = None
        phase["steps"] = options.steps
        phase["trainer"]["warmup_steps"] = min(phase["trainer"]["warmup_steps"], options.steps // 10)


def train(work: Path, phase: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train one student; its scores on held-out rows."""
    name = f"{phase['name']}-{seed}"
    started = time.monotonic()
    run(work, name, {"output": f"out/decoder/runs/{name}", "seed": seed, "phases": [phase]})
    result = json.loads((work / "out/decoder/runs" / name / phase["name"] / "result.json").read_text())
    scores = {key: value for key, value in result["after"].items() if "/" not in key and key != "loss"}
    scores["nats_a_word"] = math.log(scores["perplexity"])
    return {"seconds": round(time.monotonic() - started, 1), "steps": result["steps"], "start": result["start"][:16], "scores": scores}


def form_bytes(work: Path, phase: str) -> float:
    """Bytes a labelled token of what ``phase`` learns from, as they lie on the disk."""
    store = Store.open(work / "out/decoder/features")
    stored = store.committed("teacher" if phase == "exact" else phase).values()
    return round(sum(seal.size for done in stored for seal in done.files.values()) / sum(store.manifest.rows.filled.labelled), 1)


def load(name: str) -> dict[str, Any]:
    """A recipe of this pair."""
    tree: dict[str, Any] = yaml.safe_load((RECIPES / name).read_text(encoding="utf-8"))
    return tree


def run(work: Path, name: str, tree: dict[str, Any]) -> None:
    """Train what ``tree`` says; a run that was interrupted goes on."""
    file = work / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    program(work, "student_train", "run", str(file.resolve()))


def program(work: Path, package: str, *arguments: str) -> None:
    """Run one of the programs in ``work``."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", f"{package}.cli", *arguments], cwd=work, env=environment, stdout=sys.stderr, check=True)


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
