"""A sweep from one store against the same sweep with the teacher at work in each trial: teacher FLOPs, time, memory, bytes.

    python benchmarks/cache_cost.py --data FOLDER --work FOLDER [--rows 256] [--rounds 3] [--save benchmarks/results]

FOLDER of --data holds ``data/`` and ``teachers/`` as recipes/sst2/dump.yaml names them. The trials are TRIALS; in each round the teacher
answers once into a fresh copy of the rows (the dump), and every trial trains twice, from that store and with ``teacher: {online: ...}``,
one after the other, each in a process of its own. The same rows, steps, student and evaluation (before and after training); teacher and
student compute in bfloat16. The dump's features are those of all trials together, as `student-train needs` prints them. A run that was
stopped goes on where it was.

Figures of a process: wall and CPU seconds with Python's start (of `loop` without: optimiser steps, or from the teacher's first answer on);
seconds spent on the teacher's answers, computed or read and derived; anonymous resident memory at its most (seen every 3 ms); and the
teacher's floating-point operations: online.flops for every batch that its blocks really answered, with its padding. The file says what
torch's own counter says of one batch. Ratios are of two processes of one round.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from timing import ROOT, machine, save, shuffled

sys.path.insert(0, str(ROOT))

Tree = dict[str, Any]

KD: Tree = {"name": "kd", "options": {"alpha": 0.5, "temperature": 2.0}}
TRIALS: dict[str, list[Tree]] = {
    "kd": [KD],
    "pkd": [KD, {"name": "pkd", "weight": 50.0, "options": {"layers": "skip"}}],
    "hid_seq": [KD, {"name": "hid_seq"}],
    "att_mse": [KD, {"name": "att_mse"}],
}
TEACHER = {"model": "teachers/sst2", "head": "classification", "dtype": "bfloat16"}
EPOCHS, BATCH, HELD_OUT = 2, 32, 128
QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "eval_strategy": "no"}


def train_recipe(name: str, way: str, output: Path) -> Tree:
    """The recipe of a trial."""
    store = {"store": "store" if way == "cached" else "rows", **({"pass_name": "sst2"} if way == "cached" else {})}
    phase: Tree = {
        "name": "student",
        "student": {"layers": [2, 4, 6], "source": TEACHER["model"]},
        "data": [store],
        "methods": TRIALS[name],
        "evaluate": [{**store, "split": "dev"}],
        "metrics": ["accuracy", "agreement"],
        "epochs": EPOCHS,
        "batch_rows": BATCH,
        "trainer": {"learning_rate": 5e-5, "bf16": True, "use_cpu": True, **QUIET},
    }
    return {"output": str(output), "phases": [{**phase, **({"teacher": {"online": TEACHER}} if way == "live" else {})}]}


def dump_recipe(store: str, rows: int, features: list[str]) -> Tree:
    """The recipe of the pass, after recipes/sst2/dump.yaml."""
    tree: Tree = yaml.safe_load((ROOT / "recipes" / "sst2" / "dump.yaml").read_text(encoding="utf-8"))
    for source, limit in zip(tree["rows"]["sources"], (rows, HELD_OUT), strict=True):
        source["limit"] = limit
    del tree["rows"]["phrases"]
    return {**tree, "store": store, "teacher": TEACHER, "features": features, "ship_layers": [2, 4, 6], "batch_tokens": 1024}


def setup(work: Path, data: Path, rows: int) -> None:
    """Links to the data, the rows without features, and the recipes; what is there stays."""
    work.mkdir(parents=True, exist_ok=True)
    os.chdir(work)
    for name in ("data", "teachers"):
        if not Path(name).exists():
            Path(name).symlink_to(data / name)
    if not Path("dump.yaml").exists():
        for name in TRIALS:
            Path(f"{name}.yaml").write_text(yaml.safe_dump(train_recipe(name, "cached", Path("unused"))))
        given = ["--teacher", TEACHER["model"]]
        lines = program("student_train", "needs", *(f"{name}.yaml" for name in TRIALS), *given)
        features = yaml.safe_load(lines)["features"]
        Path("rows.yaml").write_text(yaml.safe_dump(dump_recipe("rows", rows, features)))
        program("teacher_dump", "rows", "rows.yaml")
        Path("dump.yaml").write_text(yaml.safe_dump(dump_recipe("store", rows, features)))


def program(package: str, *arguments: str) -> str:
    """What one of the programs prints."""
    command = [sys.executable, "-m", f"{package}.cli", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def measured(package: str, recipe: str) -> Tree:
    """Run ``recipe`` in a process of its own, and what it took."""
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, __file__, "--child", package, recipe], env=environment(), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{recipe} failed: {os.waitstatus_to_exitcode(status)}")
    spent = {"wall": round(time.perf_counter() - started, 2), "cpu": round(usage.ru_utime + usage.ru_stime, 2)}
    return {**spent, **json.loads(Path("took.json").read_text())}


def runs(rounds: int, found: dict[str, Tree]) -> Iterator[tuple[str, Tree]]:
    """Name and figures of each run that is not ``found`` yet."""
    for number in range(rounds):
        pairs = [(trial, way) for _, trial in shuffled(list(TRIALS), [number]) for way in ways(number, trial)]
        left = [(trial, way) for trial, way in pairs if f"{number} {trial} {way}" not in found]
        if f"{number} dump" not in found or (left and not Path("store").exists()):
            shutil.rmtree("store", ignore_errors=True)
            shutil.copytree("rows", "store")
            yield f"{number} dump", measured("teacher_dump", "dump.yaml")
        for trial, way in left:
            shutil.rmtree("out", ignore_errors=True)
            Path("trial.yaml").write_text(yaml.safe_dump(train_recipe(trial, way, Path("out"))))
            yield f"{number} {trial} {way}", measured("student_train", "trial.yaml")


def ways(number: int, trial: str) -> tuple[str, str]:
    """Both ways of a trial, one after the other, so that what disturbs one disturbs the other: the order changes from round to round."""
    return ("cached", "live") if (number + list(TRIALS).index(trial)) % 2 else ("live", "cached")


FIELDS = ("wall", "cpu", "loop_wall", "loop_cpu", "answers_wall", "answers_cpu", "anonymous_mb", "teacher_flops", "teacher_tokens")


def summarised(found: dict[str, Tree]) -> Tree:
    """Medians and ranges of what the processes took, each trial over the rounds that have both ways of it, and after how many trials a
    cache has paid, over the rounds that have all."""
    rounds = sorted({int(name.split()[0]) for name in found})
    both = {trial: [n for n in rounds if {f"{n} {trial} cached", f"{n} {trial} live"} <= found.keys()] for trial in TRIALS}
    each: Tree = {"dump": {field: spread([found[f"{n} dump"][field] for n in rounds if f"{n} dump" in found]) for field in FIELDS}}
    ratios: Tree = {}
    for trial, measured_in in both.items():
        if not measured_in:
            continue
        for way in ("cached", "live"):
            each[f"{trial} {way}"] = {field: spread([found[f"{n} {trial} {way}"][field] for n in measured_in]) for field in FIELDS}
        ratios[trial] = {"rounds": len(measured_in)}
        for field in ("wall", "cpu", "loop_wall", "loop_cpu", "anonymous_mb"):
            ratios[trial][field] = spread([found[f"{n} {trial} live"][field] / found[f"{n} {trial} cached"][field] for n in measured_in])
    whole = [number for number in rounds if all(number in measured_in for measured_in in both.values())]
    sweep, even = {}, {}
    for field in ("wall", "cpu", "loop_wall", "loop_cpu", "teacher_flops") if whole else ():
        dumps = [found[f"{n} dump"][field] for n in whole]
        sums = {way: [sum(found[f"{n} {trial} {way}"][field] for trial in TRIALS) for n in whole] for way in ("cached", "live")}
        stored = [dump + cached for dump, cached in zip(dumps, sums["cached"], strict=True)]
        sweep[field] = {"store: dump and trials": spread(stored), "live": spread(sums["live"])}
        saved = [(live - cached) / len(TRIALS) for live, cached in zip(sums["live"], sums["cached"], strict=True)]
        even[field] = spread([dump / one for dump, one in zip(dumps, saved, strict=True)]) if min(saved) > 0 else "never here"
    return {
        "whole rounds": len(whole),
        "sweep of the trials": sweep,
        "trials after which a cache has paid": even,
        "live over cached": ratios,
        "each": each,
    }


def spread(values: list[float]) -> Tree:
    """Median and range."""
    return {name: float(f"{chosen(values):.4g}") for name, chosen in (("median", statistics.median), ("low", min), ("high", max))}


def child(package: str, recipe: str) -> None:
    """One process: run the program here, with clocks around the steps and the teacher's answers."""
    import torch
    from online_memory import Watch
    from transformers import AutoConfig
    from transformers.models.bert.modeling_bert import BertEncoder

    from online.flops import forward_flops
    from online.teacher import LiveTeacher
    from student_train.teacher import StoredTeacher
    from student_train.trainer import DistillationTrainer
    from teacher_dump.teacher import TeacherPass

    torch.set_num_threads(1)
    config = AutoConfig.from_pretrained(TEACHER["model"])
    flops, blocks = forward_flops(config, "classification"), config.num_hidden_layers
    took: Tree = {"answers_wall": 0.0, "answers_cpu": 0.0, "teacher_flops": 0, "teacher_tokens": 0}
    answering, moments = [], []
    inner = BertEncoder.forward

    def counted(self: BertEncoder, hidden_BTD: torch.Tensor, *given: object, **named: object) -> object:
        if len(self.layer) == blocks:
            rows, length = hidden_BTD.shape[:2]
            took["teacher_flops"] += flops.rows([length] * rows)
            took["teacher_tokens"] += rows * length
            answering.append(now())
        return inner(self, hidden_BTD, *given, **named)

    BertEncoder.forward = counted
    for kind, names in ((StoredTeacher, ("fetch", "features")), (LiveTeacher, ("features",)), (TeacherPass, ("start",))):
        for name in names:
            setattr(kind, name, clocked(getattr(kind, name), took))
    for name in ("get_batch_samples", "_maybe_log_save_evaluate"):
        setattr(DistillationTrainer, name, noted(getattr(DistillationTrainer, name), moments))
    watch = Watch()
    try:
        if package == "teacher_dump":
            from teacher_dump.cli import main as dump

            dump(["run", recipe])
            start, stop = answering[0], now()
        else:
            from student_train.cli import main as train

            train(["run", recipe])
            start, stop = moments[0], moments[-1]
    finally:
        watch.end()
    took["loop_wall"], took["loop_cpu"] = stop[0] - start[0], stop[1] - start[1]
    took["anonymous_mb"] = watch.peak(0.0, time.perf_counter())
    Path("took.json").write_text(json.dumps(took))


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def clocked(inner: Callable[..., Any], took: Tree) -> Callable[..., Any]:
    """``inner``, its seconds added to those of the answers."""

    def outer(*given: object, **named: object) -> object:
        wall, cpu = now()
        try:
            return inner(*given, **named)
        finally:
            after = now()
            took["answers_wall"] += after[0] - wall
            took["answers_cpu"] += after[1] - cpu

    return outer


def noted(inner: Callable[..., Any], moments: list[tuple[float, float]]) -> Callable[..., Any]:
    """``inner``, the moments at which it begins and ends kept."""

    def outer(*given: object, **named: object) -> object:
        moments.append(now())
        try:
            return inner(*given, **named)
        finally:
            moments.append(now())

    return outer


def checked() -> Tree:
    """Operations of one batch by online.flops and by torch's own counter, which knows linear layers and attention as it is written out."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from online.flops import forward_flops

    config = AutoConfig.from_pretrained(TEACHER["model"])
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(4, 32, dtype=torch.long))
    return {
        "rows x tokens": [4, 32],
        "online.flops": forward_flops(config, "classification").rows([32] * 4),
        "torch": counter.get_total_flops(),
    }


def main() -> None:
    """Measure what is not there yet, and print or save the JSON after each process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=256, help="rows that are trained on; another number needs another --work")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    target = options.save and options.save.resolve()
    setup(options.work, options.data.resolve(), options.rows)
    kept = Path("found.json")
    found: dict[str, Tree] = json.loads(kept.read_text()) if kept.exists() else {}
    for name, taken in runs(options.rounds, found):
        found[name] = taken
        kept.write_text(json.dumps(found, indent=1))
        print(f"{name}: {taken['wall']:.0f} s, {taken['cpu']:.0f} s of CPU, loop {taken['loop_cpu']:.1f} s of CPU", file=sys.stderr)
    from store.reader import Store

    manifest = Store.open(Path("store")).manifest
    sizes = {name: sum(path.stat().st_size for path in Path(name).rglob("*") if path.is_file()) for name in ("rows", "store")}
    sizes["features"] = sum(path.stat().st_size for path in Path("store").rglob("c.*") if "sst2" in path.parts)
    what = {
        "rows": manifest.rows.rows,
        "tokens": manifest.rows.tokens,
        "rows that are trained on": options.rows,
        "rows that are measured on": HELD_OUT,
        "epochs": EPOCHS,
        "rows a step": BATCH,
        "teacher": TEACHER,
        "student": "blocks 2, 4 and 6 of it",
        "features": yaml.safe_load(Path("dump.yaml").read_text())["features"],
        "bytes on disk": sizes,
        "gpu": "not measured",
    }
    figures = {**machine(), **what, "flops of a batch": checked(), **summarised(found), "processes": found}
    save(target, "cache_cost", figures)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:4])
    else:
        main()
