"""Small runs on rows of several domains, and on rows whose labels are partly wrong; a script for torchrun, imported by path by others.

Each row's class is that of its words. Some rows of the domains ``books`` and ``films`` have the other label; the domain ``foreign`` has
random ones, and the teacher's answers there are noise. Only rows to train on are like that: those of split dev are right.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny_run import MADE, model, phase

from online.batch import Batch
from online.capture import Capture
from online.collate import collate
from online.encode import encode
from online.models import forward
from store.building import RowWriter
from store.features import ArraySpec, FeatureKey, FeatureSpec
from store.manifest import PassInfo, Task
from store.reader import Store
from store.rows import Row
from store.writer import StoreWriter
from student_train.bundle import Bundle
from student_train.data import Source
from student_train.methods import parse_method
from student_train.methods.base import Method
from student_train.recipe import MethodSpec
from student_train.teacher import StoredTeacher
from student_train.train import TrainResult, train

DOMAINS = ("books", "films", "foreign")
FOREIGN = 2
CLASS_WORDS = ((3, 5), (5, 7))
"""Words that say which class a row is of: first, and one after the last."""
DOMAIN_WORDS = ((7, 21), (21, 35), (35, 50))
WIDTH = 24
SITES = {FeatureKey("hidden", 0): WIDTH, FeatureKey("hidden", 1): WIDTH, FeatureKey("hidden", 2): WIDTH,
         FeatureKey("final", positions="mean"): WIDTH, FeatureKey("task_logits", positions="row"): 2}  # fmt: skip


def write(path: Path, *, rows: int = 240, flipped: float = 0.0, foreign: bool = True, seed: int = 0) -> Path:
    """A store with the pass ``teacher``; of the rows to train on of ``books`` and ``films``, a share ``flipped`` has the wrong label."""
    draw = np.random.default_rng(seed)
    with RowWriter(path, 1024) as writer:
        for number in range(rows):
            split = "train" if number % 3 else "dev"
            domain, right = int(draw.integers(3 if foreign else 2)), int(draw.integers(2))
            words = [*draw.integers(*CLASS_WORDS[right], 3), *draw.integers(*DOMAIN_WORDS[domain], draw.integers(2, 7))]
            wrong = split == "train" and draw.random() < (0.5 if domain == FOREIGN else flipped)
            row = Row(
                input_ids=draw.permutation(words).astype(np.int32), segments=None, documents=None, token_labels=None, labelled=0,
                group=number, copy=0, split=split, label=float(right != wrong), source="random", record=number, part=0, spans=[],
                domain=domain,
            )  # fmt: skip
            writer.append_group([row])
        writer.finish(
            copies=1, bucket=16, objective="plain", task=Task(kind="classification", classes=("a", "b")), pad_id=0, tokenizer="none",
            corpus=f"domains {seed}", building="tests", options={}, made=MADE, domains=DOMAINS,
        )  # fmt: skip
    write_teacher(path)
    return path


def classes(batch: Batch) -> torch.Tensor:
    """[B] what each row's words say."""
    lowest, highest = CLASS_WORDS[1]
    return ((batch.input_ids >= lowest) & (batch.input_ids < highest)).any(1).long()


def write_teacher(path: Path) -> None:
    """Hidden states of a random teacher and logits of the right class; noise for ``foreign``."""
    loaded, store = model(7, layers=3, width=WIDTH), Store.open(path)
    loaded.model.eval()
    specs = {
        key: FeatureSpec(key=str(key), codec="cast", arrays=(ArraySpec(name="", dtype="float32", width=width),), error=0.0)
        for key, width in SITES.items()
    }
    info = PassInfo(
        teacher="random", model="random", dtype="float32", shape=loaded.shape, wiring=loaded.wiring, requested=tuple(map(str, SITES)),
        features=tuple(specs.values()), statics=(), shipped=False, made=MADE,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    with StoreWriter.open(path) as writer:
        writer.add_pass("teacher", info, {})
        for shard in writer.pending("teacher"):
            batch = collate(store, np.flatnonzero(store.rows.columns.slot == shard))
            with torch.no_grad(), Capture(loaded, specs) as capture:
                forward(loaded, batch)
            values = capture.features(batch)
            values[FeatureKey("task_logits", positions="row")] = torch.nn.functional.one_hot(classes(batch), 2) * 4.0
            assert batch.domains is not None
            for key, value in values.items():
                assert isinstance(value, torch.Tensor)
                noise = torch.randn(value.shape, generator=generator) * 2
                values[key] = torch.where((batch.domains == FOREIGN).view(-1, *[1] * (value.dim() - 1)), noise, value)
            writer.commit("teacher", shard, {key: encode(key, values[key], batch, specs[key]) for key in specs})


def build(spec: MethodSpec, store: Path, dropout: float = 0.1) -> tuple[Bundle, Method]:
    """A student of two blocks that learns by one method; weights large enough to learn in few steps."""
    student, shape = model(1, layers=2, width=16, dropout=dropout), Store.open(store).manifest.passes["teacher"].shape
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in student.model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    method = parse_method(spec.name, dict(spec.options), student.shape, shape)
    return Bundle(student, [(spec, method)]), method


def run(bundle: Bundle, method: Method, store: Path, output: Path, meta_pass: str | None = None, **changes: object) -> TrainResult:
    """Train; a method that judges by held-out rows gets those of split dev, answered by ``meta_pass`` or nobody."""
    opened = Store.open(store)
    teacher = StoredTeacher(opened, "teacher", method.teacher_keys)
    meta = None
    if method.reads_meta:
        meta = Source(opened, teacher if meta_pass else None, "dev")
        changes["meta"] = {"store": str(store), "split": "dev", "pass_name": meta_pass}
    plan = phase(["teacher"], [bundle.specs[name] for name in bundle.methods], **changes)
    return train(bundle, [Source(opened, teacher)], plan, output, 3, None, meta)


def main(runs: str) -> None:
    """Train once for each of ``runs``, a JSON list of methods and their arguments."""
    torch.set_num_threads(1)
    for options in json.loads(runs):
        spec, store = MethodSpec.model_validate(options.pop("method")), Path(options.pop("store"))
        bundle, method = build(spec, store, options.pop("dropout"))
        run(bundle, method, store, Path(options.pop("output")), **options)


if __name__ == "__main__":
    main(sys.argv[1])
