"""Small runs with a teacher that is right, one that misleads, and a reader of rows; a script for torchrun, imported by path by others.

The rows are those of tiny_domains without a foreign domain, with right labels.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import tiny_domains
from tiny_run import MADE, model, phase

from online.batch import Batch, dense
from online.capture import Capture
from online.collate import collate
from online.encode import encode
from online.models import LoadedModel, forward
from online.teacher import Teachers
from store.features import ArraySpec, FeatureKey, FeatureSpec
from store.manifest import PassInfo
from store.reader import Store
from store.writer import StoreWriter
from student_train.bundle import Bundle
from student_train.data import Source
from student_train.methods import parse_method
from student_train.methods.base import Method
from student_train.recipe import MethodSpec
from student_train.teacher import StoredTeacher
from student_train.train import TrainResult, train

LOGITS, FIRST = FeatureKey("task_logits", positions="row"), FeatureKey("final", positions="first")
TEACHERS = ("reader", "misleading", "good")


def write(path: Path, rows: int = 240) -> Path:
    """A store with the passes of TEACHERS; two of three rows are to train on."""
    tiny_domains.write(path, rows=rows, foreign=False)
    for name in TEACHERS:
        _write_pass(path, name)
    return path


def _write_pass(path: Path, name: str) -> None:
    loaded, store = model(7, layers=2, width=12), Store.open(path)
    loaded.model.eval()
    key, width = (FIRST, 12) if name == "reader" else (LOGITS, 2)
    spec = FeatureSpec(key=str(key), codec="cast", arrays=(ArraySpec(name="", dtype="float32", width=width),), error=0.0)
    info = PassInfo(
        teacher=name, model=name, dtype="float32", shape=loaded.shape, wiring=loaded.wiring, requested=(str(key),), features=(spec,),
        statics=(), shipped=False, made=MADE,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    with StoreWriter.open(path) as writer:
        writer.add_pass(name, info, {})
        for shard in writer.pending(name):
            batch = collate(store, np.flatnonzero(store.rows.columns.slot == shard))
            writer.commit(name, shard, {key: encode(key, _answer(name, loaded, batch, generator), batch, spec)})


def _answer(name: str, loaded: LoadedModel, batch: Batch, generator: torch.Generator) -> Tensor:
    """The reader's state at the first token; logits of the right class, or of the wrong one, with noise."""
    if name == "reader":
        with torch.no_grad(), Capture(loaded, {FIRST}) as capture:
            forward(loaded, batch)
        return dense(capture.features(batch), FIRST)
    right_B = tiny_domains.classes(batch)
    noise_BC = torch.randn(len(right_B), 2, generator=generator) * 0.5
    return torch.nn.functional.one_hot(right_B if name == "good" else 1 - right_B, 2) * 3.0 + noise_BC


def build(spec: MethodSpec, store: Path, dropout: float = 0.0) -> tuple[Bundle, Method]:
    """A student of two blocks; weights large enough to learn in few steps."""
    student, passes = model(1, layers=2, width=16, dropout=dropout), Store.open(store).manifest.passes
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in student.model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    names = TEACHERS if spec.name == "rl_kd" else TEACHERS[1:]
    method = parse_method(spec.name, dict(spec.options), student.shape, {name: passes[name].shape for name in names})
    return Bundle(student, [(spec, method)]), method


def teachers(method: Method, store: Store) -> Teachers:
    names = {key.pass_name for key in method.teacher_keys}
    keys = {name: frozenset(key.of("") for key in method.teacher_keys if key.pass_name == name) for name in names}
    return Teachers({name: StoredTeacher(store, name, keys[name]) for name in TEACHERS if name in names})


def run(bundle: Bundle, method: Method, path: Path, output: Path, seed: int = 3, **changes: object) -> TrainResult:
    """Train; a method that judges by held-out rows gets those of split dev."""
    store, meta = Store.open(path), None
    if method.reads_meta:
        meta, changes["meta"] = Source(store, None, "dev"), {"store": str(path), "split": "dev"}
    plan = phase(["good"], [bundle.specs[name] for name in bundle.methods], **changes)
    return train(bundle, [Source(store, teachers(method, store))], plan, output, seed, None, meta)


def main(runs: str) -> None:
    """Train once for each of ``runs``, a JSON list of methods and their arguments."""
    torch.set_num_threads(1)
    for options in json.loads(runs):
        spec, store = MethodSpec.model_validate(options.pop("method")), Path(options.pop("store"))
        bundle, method = build(spec, store)
        run(bundle, method, store, Path(options.pop("output")), **options)


if __name__ == "__main__":
    main(sys.argv[1])
