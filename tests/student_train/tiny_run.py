"""A training run small enough for tests: run as a script by those that kill it or need ranks, imported by path by others.

The rows are random words with random classes in a real store; the teacher is a random BERT whose answers the store holds.
``Bank`` stands for methods with state: a buffer that belongs to its rank, and draws from every generator.
"""

import gc
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BertConfig

from online.batch import Batch, Features, dense
from online.capture import Capture
from online.collate import collate
from online.encode import encode
from online.models import HEADS, LoadedModel, forward
from online.teacher import Teachers
from store.building import RowWriter
from store.features import ArraySpec, FeatureKey, FeatureSpec
from store.manifest import PassInfo, Provenance, Task
from store.reader import Store
from store.rows import Row
from store.shape import Head
from store.writer import StoreWriter
from student_train.bundle import Bundle
from student_train.data import Source, survey
from student_train.evaluate import HeldOut, held_out_rows
from student_train.methods import METHODS, parse_method
from student_train.methods.base import Method, Terms
from student_train.probe import Probe
from student_train.probe_plan import probe_plan
from student_train.recipe import MethodSpec, PhaseSpec
from student_train.teacher import StoredTeacher
from student_train.train import TrainResult, train

VOCAB = 50
HIDDEN = FeatureKey("hidden", 2)
LOGITS = FeatureKey("task_logits", positions="row")
MADE = Provenance(command=("tests",), versions={}, created="2026-01-01T00:00:00Z")


def model(
    seed: int, *, layers: int, width: int, dropout: float = 0.1, head: Head = "classification", vocabulary: int = VOCAB
) -> LoadedModel:
    """A random BERT, with a class head if nothing else is said."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=32,
        num_labels=2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return LoadedModel.of(HEADS[head].from_config(config), head)


def write_rows(path: Path, rows: int = 48, seed: int = 0, group: int = 1, labelled: bool = True) -> Store:
    """Rows of 3 to 20 random words, every other one of class 1 (or none with a label), in groups of ``group`` rows."""
    random_numbers = np.random.default_rng(seed)
    made = []
    with RowWriter(path, 128 * max(1, group // 4)) as writer:
        for number in range(rows):
            ids = random_numbers.integers(3, VOCAB, random_numbers.integers(3, 21)).astype(np.int32)
            row = Row(
                input_ids=ids, segments=None, documents=None, token_labels=None, labelled=0, group=number // group, copy=0, split="train",
                label=float(number % 2) if labelled else None, source="random", record=number, part=0, spans=[],
            )  # fmt: skip
            made.append(row)
        for first in range(0, rows, group):
            writer.append_group(made[first : first + group])
        writer.finish(
            copies=1, bucket=16, objective="plain", task=Task(kind="classification", classes=("a", "b")), pad_id=0, tokenizer="none",
            corpus=f"random {seed}", building="tests", options={}, made=MADE,
        )  # fmt: skip
    return Store.open(path)


def write_teacher(path: Path) -> None:
    """Dump hidden states and logits of a random teacher into the pass ``bert``."""
    loaded = model(7, layers=3, width=24)
    loaded.model.eval()
    store = Store.open(path)
    specs = {
        key: FeatureSpec(key=str(key), codec="cast", arrays=(ArraySpec(name="", dtype="float32", width=width),), error=0.0)
        for key, width in ((HIDDEN, 24), (LOGITS, 2))
    }
    info = PassInfo(
        teacher="random", model="random", dtype="float32", shape=loaded.shape, wiring=loaded.wiring, requested=(str(HIDDEN), str(LOGITS)),
        features=tuple(specs.values()), statics=(), shipped=False, made=MADE,
    )  # fmt: skip
    with StoreWriter.open(path) as writer:
        writer.add_pass("bert", info, {})
        for shard in writer.pending("bert"):
            batch = collate(store, np.flatnonzero(store.rows.columns.slot == shard))
            with torch.no_grad(), Capture(loaded, specs) as capture:
                forward(loaded, batch)
            values = capture.features(batch)
            writer.commit("bert", shard, {key: encode(key, values[key], batch, specs[key]) for key in specs})


class Bank(Method):
    """Pulls the CLS state to a moving mean of earlier ones, with noise of every generator; can kill its own process."""

    bank: Tensor

    def __init__(self, width: int, kill_at: int | None = None) -> None:
        super().__init__([FeatureKey("hidden", 1, "first")])
        self.register_buffer("bank", torch.zeros(width))
        self.scale = torch.nn.Parameter(torch.ones(width))
        self.kill_at, self.calls = kill_at, 0

    def counts(self, batch: Batch) -> Terms:
        return {"bank": torch.tensor(float(len(batch.rows)))}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        self.calls += 1
        if self.calls == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        first_BW = dense(student, FeatureKey("hidden", 1, "first"))
        noise = random.random() + float(np.random.random())
        loss = (first_BW * self.scale - self.bank - 0.01 * noise * torch.rand(())).square().sum()
        self.bank.lerp_(first_BW.detach().mean(0), 0.1)
        return {"bank": loss}


class Turns(Method):
    """Pulls the first token's state behind block 1 to zero, then its query in block 2, turn and turn about.

    In the second turn block 1 and what is no block stand still by its gates, in the first one block 2 by itself, but for its rate.
    """

    def __init__(self, width: int) -> None:
        self.turns = FeatureKey("hidden", 1, "first"), FeatureKey("query", 2, "first")
        super().__init__(self.turns)
        self.scale = torch.nn.Parameter(torch.ones(width))

    def counts(self, batch: Batch) -> Terms:
        return {"turns": torch.tensor(float(len(batch.rows)))}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        first_BW = dense(student, self.turns[self.moment.step % 2])
        return {"turns": (first_BW * self.scale).square().sum() if self.moment.step % 2 == 0 else (first_BW - 1).square().sum()}

    def gates(self) -> dict[int, float]:
        return {1: 1.0, 2: 0.5} if self.moment.step % 2 == 0 else {0: 0.0, 1: 0.0, 2: 0.5}


Evaluate = Callable[[Bundle], dict[str, float]]


def phase(pass_names: list[str | None], methods: list[MethodSpec], **changes: object) -> PhaseSpec:
    """A phase over one store for each of ``pass_names``; only its loop matters here."""
    options: dict[str, Any] = {
        "name": "tiny", "student": {"random": {}}, "data": [{"store": "s", "pass_name": name} for name in pass_names], "methods": methods,
        "teacher": "store" if any(pass_names) else "none", "evaluate": [{"store": "s"}], "steps": 12, "batch_rows": 8, **changes,
    }  # fmt: skip
    options["trainer"] = {
        "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 4, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        **options.get("trainer", {}),
    }  # fmt: skip
    return PhaseSpec.model_validate(options)


def run(
    stores: list[Path],
    output: Path,
    *,
    methods: list[MethodSpec],
    dropout: float = 0.1,
    bank: bool = True,
    turns: bool = False,
    kill_at: int | None = None,
    evaluate: Evaluate | None = None,
    seed: int = 3,
    rows: dict[str, Any] | None = None,
    pass_name: str = "bert",
    probe: dict[str, Any] | None = None,
    **changes: object,
) -> tuple[Bundle, TrainResult]:
    """Train a fresh two-layer student from ``stores``; those with ``pass_name`` teach. ``rows`` says which and in what order.

    A method for several teachers gets the one pass as two of them, ``small`` and ``large``. ``probe`` looks at rows of the first store.
    """
    opened = [Store.open(path) for path in stores]
    pass_names = [pass_name if pass_name in store.manifest.passes else None for store in opened]
    teacher_shape = next((store.manifest.passes[pass_name].shape for store in opened if store.manifest.passes), None)
    words = teacher_shape is not None and teacher_shape.head == "masked_lm"
    vocabulary = teacher_shape.vocab if words and teacher_shape else VOCAB
    student = model(1, layers=2, width=16, dropout=dropout, head="masked_lm" if words else "classification", vocabulary=vocabulary)
    several = any(METHODS[spec.name].several for spec in methods)
    known = dict.fromkeys(("small", "large"), teacher_shape) if several else teacher_shape
    torch.manual_seed(2)
    built = [(spec, parse_method(spec.name, dict(spec.options), student.shape, known)) for spec in methods]
    if bank:
        built.append((MethodSpec(name="bank", weight=0.1), Bank(16, kill_at)))
    if turns:
        built.append((MethodSpec(name="turns"), Turns(16)))
    bundle = Bundle(student, built)
    wanted = frozenset(key.of("") for _, method in built for key in method.teacher_keys)
    teachers = [StoredTeacher(store, name, wanted) if name else None for store, name in zip(opened, pass_names, strict=True)]
    if several:
        teachers = [teacher and Teachers({"small": teacher, "large": teacher}) for teacher in teachers]
    sources = [
        Source(store, teacher, pass_name=name, **(rows or {})) for store, teacher, name in zip(opened, teachers, pass_names, strict=True)
    ]
    bundle.survey(lambda: survey(sources))
    plan = phase(pass_names, methods, probe=probe, **changes)
    looking = None
    if probe is not None:
        probed = probe_plan(plan, student.shape, teacher_shape, opened[0].manifest.rows)
        answers = StoredTeacher(opened[0], pass_name, probed.teacher_keys)
        looking = Probe(probed, HeldOut(opened[0], held_out_rows(opened[0], "train", probed.rows), answers, False, ""))
    return bundle, train(bundle, sources, plan, output, seed, None if evaluate is None else lambda: evaluate(bundle), probe=looking)


def main(runs: str) -> None:
    """Train once for each of ``runs``, a JSON list of ``run``'s arguments; ``copied`` names a checkpoint to start from."""
    torch.set_num_threads(1)
    gc.freeze()  # every start of DeepSpeed collects garbage three times, a third of a second each, and would look through all modules
    for options in json.loads(runs):
        stores, output = [Path(store) for store in options.pop("stores")], Path(options.pop("output"))
        if copied := options.pop("copied", None):
            if os.environ.get("RANK", "0") == "0":
                shutil.copytree(copied, output / "checkpoints" / Path(copied).name)
            torch.distributed.barrier()
        options["methods"] = [MethodSpec.model_validate(spec) for spec in options["methods"]]
        run(stores, output, **options)


if __name__ == "__main__":
    main(sys.argv[1])
