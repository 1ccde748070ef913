"""GLMD on real text and SST-2: a teacher tuned on clozes, students with all and with half of the words, and rows of table 4.

    python benchmarks/glmd.py --data FOLDER --work FOLDER --save FILE [--seeds 0] [--hours 2] [--only glmd masked ...]

FOLDER of --data holds ``data/`` and ``teachers/``. Phases are those of recipes/glmd, cut to a common size and begun from three of the
teacher's blocks; students that share a phase share its training. What is done stands in --save and is not done again; with --hours no
student is begun later than that, and a phase that is interrupted goes on from its last checkpoint in --work. For a try: --text-rows 64
--task-rows 64 --dev-rows 16 --steps 1 --batch-rows 4.

The paper's order (SuperGLUE, Tan et al. 2023, arXiv 2306.06625): GLMD 67.9, with half of the words 67.4, labels added 67.5, MSE in place
of KL 66.7, masked words alone 66.2, no words in the task stage 64.4. For each student the JSON has held-out scores of all its phases,
its parameters and bytes, which held-out rows it gets right, and the seconds of each phase on this machine.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import safe_open
from timing import ROOT, machine

from online.collate import collate
from online.kept_words import read_kept_words
from online.models import ModelSpec, forward, load_model
from store.reader import Store

RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "labels": ("ablations", ("labels",)),
    "glmd": ("ablations", ("pretraining", "task_words", "glmd")),
    "vocabulary": ("train_vc", ("pretraining", "task_words", "task")),
    "no_task_words": ("ablations", ("pretraining", "no_task_words")),
    "mse_task": ("ablations", ("pretraining", "task_words", "mse_task")),
    "hard": ("ablations", ("pretraining", "hard_task_words", "hard")),
    "no_pad_mask": ("ablations", ("no_pad_mask_pretraining", "no_pad_mask_task_words", "no_pad_mask")),
    "masked": ("ablations", ("masked_pretraining", "masked_task_words", "masked")),
    "mse_words": ("ablations", ("mse_pretraining", "mse_task_words", "mse_words")),
}
"""Student -> recipe of recipes/glmd, and its phases."""
START = {"layers": [2, 4, 6]}
EPOCHS = {"text": 2.0, "clozes": 1.0}
TASK_RATE = 5e-5


def main() -> None:
    """Make what is left and save the JSON after each student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--save", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--hours", type=float, default=math.inf)
    parser.add_argument("--only", nargs="+", choices=sorted(RUNS), default=list(RUNS))
    parser.add_argument("--text-rows", type=int, default=2000, help="paragraphs of up to 128 tokens")
    parser.add_argument("--task-rows", type=int, default=10000, help="sentences to train on")
    parser.add_argument("--dev-rows", type=int, default=872, help="sentences to measure on, and at most so many paragraphs")
    parser.add_argument("--steps", type=int, help="of each phase, in place of epochs")
    parser.add_argument("--batch-rows", type=int, help="of each phase, in place of 64 and 32")
    options = parser.parse_args()
    until = time.monotonic() + options.hours * 3600
    sizes = {name: getattr(options, name) for name in ("text_rows", "task_rows", "dev_rows", "steps", "batch_rows")}
    figures = json.loads(options.save.read_text()) if options.save.exists() else {"sizes": sizes, "students": {}}
    if figures["sizes"] != sizes:
        raise SystemExit(f"{options.save} holds another size, {figures['sizes']}: give another file and another --work")
    figures["teacher"] = prepare(options)
    for seed in options.seeds:
        for name in options.only:
            if str(seed) in figures["students"].get(name, {}):
                continue
            if time.monotonic() > until:
                return
            figures["students"].setdefault(name, {})[str(seed)] = student(options, name, seed)
            figures |= {"machine": machine(), "versions": {package: version(package) for package in ("torch", "transformers")}}
            options.save.parent.mkdir(parents=True, exist_ok=True)
            options.save.write_text(json.dumps(figures, indent=1) + "\n")
            print(name, seed, {phase: one["scores"] for phase, one in figures["students"][name][str(seed)]["phases"].items()}, flush=True)


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Rows, the task's teacher, and both teachers' answers; what is there already stays. What the teacher scores."""
    options.work.mkdir(parents=True, exist_ok=True)
    for folder in ("data", "teachers"):
        if not (options.work / folder).exists():
            (options.work / folder).symlink_to((options.data / folder).resolve())
    recipes = ROOT / "recipes" / "glmd"
    few = [f"rows.sources.0.limit={options.task_rows}", f"rows.sources.1.limit={options.dev_rows}"]
    program(options.work, "teacher_dump", "rows", str(recipes / "clozes.yaml"), *few, "teacher.model=teachers/mlm")
    short = [] if options.steps is None else [f"phases.0.steps={options.steps}", "phases.0.epochs=null"]
    program(options.work, "student_train", "run", str(recipes / "teacher.yaml"), *short)
    few_texts = [f"rows.sources.0.limit={options.text_rows}", f"rows.sources.1.limit={min(options.dev_rows, 200)}"]
    for name, limits in (("clozes", few), ("text", few_texts)):
        program(options.work, "teacher_dump", "run", str(recipes / f"{name}.yaml"), *limits)
        if "no_pad_mask" in options.only:
            padded = [f"store=out/glmd/{name}_padded", "rows.padding=true"]
            program(options.work, "teacher_dump", "run", str(recipes / f"{name}.yaml"), *limits, *padded)
    folder = options.work / "out" / "glmd" / "teacher" / "teacher"
    return {**scores(folder), **size_of(folder / "student")}


def student(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Train the phases of ``name`` that are not trained yet; what they score."""
    recipe, names = RUNS[name]
    output = f"out/glmd/{recipe}-{seed}"
    file = options.work / f"{recipe}-{seed}.yaml"
    file.write_text(yaml.safe_dump(cut(recipe, output, seed, options.steps, options.batch_rows), sort_keys=False), encoding="utf-8")
    found = {}
    for phase in names:
        started, folder = time.monotonic(), options.work / output / phase
        known = (folder / "seconds").exists()
        program(options.work, "student_train", "run", str(file), "--phase", phase)
        if not known:
            (folder / "seconds").write_text(f"{time.monotonic() - started:.1f}")
        found[phase] = {**scores(folder), "seconds": float((folder / "seconds").read_text())}
    return {"phases": found, **size_of(folder / "student"), "right": right(options.work / "out/glmd/clozes", folder / "student")}


def right(clozes: Path, folder: Path) -> str:
    """Which held-out rows a student answers rightly, as bits in hexadecimal digits: for paired comparisons."""
    store, found = Store.open(clozes), []
    rows = np.array([row for row in range(len(store.rows)) if store.rows.about(row)["split"] == "dev"])
    model, kept = load_model(ModelSpec(model=folder, head="masked_lm")), read_kept_words(folder)
    words = torch.tensor(store.manifest.rows.origins[0].options["verbalisers"])
    columns = words if kept is None else kept.places[words]
    with torch.no_grad():
        for some in np.array_split(rows, range(64, len(rows), 64)):
            batch = collate(store, some)
            assert batch.token_labels is not None
            found += forward(model, batch).logits[batch.token_labels >= 0][:, columns].argmax(-1).tolist()
    return np.packbits(np.array(found) == store.rows.label_at(rows)).tobytes().hex()


def cut(recipe: str, output: str, seed: int, steps: int | None, batch_rows: int | None) -> dict[str, Any]:
    """The recipe with all phases at the common size, and a student that learns from labels alone."""
    tree = yaml.safe_load((ROOT / "recipes" / "glmd" / f"{recipe}.yaml").read_text(encoding="utf-8"))
    phases = [phase for phase in tree["phases"] if not phase["name"].startswith("tinybert")]
    last = phases[-1]
    phases.append({**last, "name": "labels", "student": dict(START), "methods": [{"name": "cloze_loss"}], "teacher": "none"})
    for phase in phases:
        of_task = "clozes" in phase["data"][0]["store"]
        phase["epochs"] = EPOCHS["clozes" if of_task else "text"]
        if steps is not None:
            phase |= {"steps": steps}
            del phase["epochs"]
        if batch_rows is not None:
            phase |= {"batch_rows": batch_rows, "accumulation": 1}
        if "phase" not in phase["student"]:
            vocabulary = {key: value for key, value in phase["student"].items() if key == "vocabulary"}
            phase["student"] = START | vocabulary | ({"source": "teachers/mlm"} if of_task else {})
        rate = {"learning_rate": TASK_RATE} if of_task else {}
        phase["trainer"] = {**phase["trainer"], **rate, "save_steps": 50, "eval_steps": 1_000_000}
    return {"output": output, "seed": seed, "phases": phases}


def scores(folder: Path) -> dict[str, Any]:
    """Held-out scores of a finished phase, before and after."""
    result = json.loads((folder / "result.json").read_text())
    return {"before": result["before"], "scores": result["after"], "steps": result["steps"]}


def size_of(folder: Path) -> dict[str, int]:
    """Parameters and bytes of a folder's weights."""
    with safe_open(folder / "model.safetensors", "pt") as weights:
        parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118 (no mapping)
    return {"parameters": parameters, "bytes": (folder / "model.safetensors").stat().st_size}


def program(work: Path, package: str, *arguments: str) -> None:
    """Run one of the programs in ``work``; a run that was interrupted goes on."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", f"{package}.cli", *arguments], cwd=work, env=environment, stdout=sys.stderr, check=True)


if __name__ == "__main__":
    main()
