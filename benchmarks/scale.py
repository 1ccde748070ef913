"""How far the formulas of docs/scale.md are from what is measured, at sizes that a CPU can run; a JSON for benchmarks/results.

Memory is what torch's allocator was asked for, counted by torch.profiler from each tensor's making to its end. Operations are those that
torch.utils.flop_counter sees. Shardings run as two processes over gloo. Times are of one machine: the speed is taken from the first
shape and used for the others.

    python benchmarks/scale.py --save benchmarks/results
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import ROOT, machine, save
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.utils import logging

sys.path.insert(0, str(ROOT))

from online.batch import Batch
from online.collate import collate
from online.models import HEADS
from online.planner import Units
from online.replica import joined
from online.sharding import Kind, Sharding
from online.sizes import GATHERED, held
from store.provenance import provenance
from store.reader import Store
from store.table import Ints
from teacher_dump.amount import Amount
from teacher_dump.batches import cut, padded_lengths
from teacher_dump.choices import batch_bytes
from teacher_dump.dump import dump, ensure_rows, requested
from teacher_dump.launch import launch
from teacher_dump.recipe import DumpRecipe
from teacher_dump.sketch import Sketch, sketch
from teacher_dump.teacher import TeacherPass, load_pass

WORDS = 4000
ROWS = 96
SHAPES: dict[str, tuple[str, str, dict[str, int]]] = {
    "bert": ("bert", "masked_lm", {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}),
    "gpt2": ("gpt2", "causal_lm", {"n_embd": 256, "n_layer": 4, "n_head": 4}),
    "llama": (
        "llama",
        "causal_lm",
        {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 688},
    ),
    "llama, wider": (
        "llama",
        "causal_lm",
        {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 1376},
    ),
    "qwen3": (
        "qwen3",
        "causal_lm",
        {
            "hidden_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "intermediate_size": 768,
        },
    ),
}
FEATURES: dict[str, Sequence[str]] = {
    "all hidden": ("hidden.*@all",),
    "last hidden": ("hidden.-1@all",),
    "64 words": ("lm_logits@labels:top64",),
}


def write_models(folder: Path) -> None:
    """A random teacher of each shape with a tokenizer, and a text."""
    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, **{f"w{n}": n for n in range(3, WORDS)}}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]", eos_token="[PAD]"
    )
    for name, (family, head, sizes) in SHAPES.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, vocab_size=WORDS, max_position_embeddings=512, pad_token_id=0, **sizes)
        model = HEADS[head].from_config(config)  # type: ignore[index, attr-defined]
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw = torch.Generator().manual_seed(0)
    lines = []
    for _ in range(ROWS):
        length = int(torch.randint(20, 128, (), generator=draw))
        lines.append({"text": " ".join(f"w{int(n)}" for n in torch.randint(3, WORDS, (length,), generator=draw))})
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def recipe_of(folder: Path, name: str, features: Sequence[str], sharding: Sharding | None = None) -> DumpRecipe:
    """A dump of one teacher."""
    head = SHAPES[name][1]
    return DumpRecipe.model_validate(
        {
            "store": folder / f"store-{name}-{len(features[0])}",
            "pass_name": "scale",
            "teacher": {"model": folder / name, "head": head},
            "rows": {
                "sources": [{"files": [str(folder / "text.jsonl")]}],
                "objective": "mlm" if head == "masked_lm" else "causal",
                "max_length": 128,
                "slot_tokens": 2048,
            },
            "features": list(features),
            "batch_tokens": 1024,
            "device": "cpu",
            "sharding": sharding or Sharding(),
        }
    )


def teacher_of(recipe: DumpRecipe) -> tuple[TeacherPass, Sketch, Store, Amount]:
    """The real teacher, the one on paper, and the rows."""
    made = provenance(sys.argv)
    tokenizer, requests = requested(recipe)
    ensure_rows(recipe, tokenizer, recipe.store, made)
    store = Store.open(recipe.store)
    amount = Amount.of(store.rows)
    plain = sketch(recipe, requests, Units.average(store.rows), amount.longest, made)
    with joined(1, grouped=False) as replica:
        teacher = load_pass(recipe, requests, store.rows, made, replica)
    return teacher, plain, store, amount


def largest_batch(store: Store, tokens: int) -> Batch:
    """The batch of the longest rows that has most of them."""
    batches = [members for shard in range(store.rows.info.slots) for members in cut(store.rows, store.rows.rows_of(shard), tokens)]
    return collate(store, max(batches, key=lambda members: _size(store, members)))


def _size(store: Store, members: Ints) -> tuple[int, int]:
    padded = padded_lengths(store.rows, members)
    return int(padded.max()), int(padded.sum())


def peak(work: Callable[[], object]) -> int:
    """The most bytes that are taken at once while ``work`` runs, beside those before."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def compared(predicted: float, measured: float) -> dict[str, float]:
    """Both, and the error of the prediction."""
    return {"predicted": round(predicted), "measured": round(measured), "error": round(predicted / measured - 1, 4)}


def memory_and_work(folder: Path) -> dict[str, Any]:
    """Weights, memory of a batch, operations and bytes of each shape, and how long a batch takes."""
    found: dict[str, Any] = {}
    for name in SHAPES:
        for kind, features in FEATURES.items():
            recipe = recipe_of(folder, name, features)
            teacher, plain, store, amount = teacher_of(recipe)
            batch = largest_batch(store, 1024)
            rows, tokens = batch.mask.shape
            labelled = int(batch.labelled.sum())
            counter = FlopCounterMode(display=False)
            with counter, sdpa_kernel(SDPBackend.MATH):  # whose products are seen
                teacher.start(batch).arrays()
            flops = plain.flops
            words = plain.words(rows * tokens, rows, labelled)
            dump(recipe, sys.argv)
            opened = Store.open(recipe.store)
            written = sum(seal.size for commit in opened.committed("scale").values() for seal in commit.files.values())
            found[f"{name}; {kind}"] = {
                "weights": compared(plain.weights, sum(weight.nbytes for weight in teacher.loaded.model.parameters())),
                "batch_memory": compared(plain.batch_bytes(rows, tokens, labelled), peak(partial(teacher.start, batch))),
                "operations": compared(
                    flops.token * rows * tokens + flops.pair * rows * tokens**2 + flops.row * rows + flops.word * words,
                    counter.get_total_flops(),
                ),
                "file_bytes": compared(sum(amount.file_bytes(spec) for spec in plain.teacher.specs), written),
            }
    return found


def times(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of a forward pass of each shape, from the speed of the first one; in turn, so that all meet the same load."""
    kept = []
    for name in SHAPES:
        teacher, plain, store, _ = teacher_of(recipe_of(folder, name, FEATURES["last hidden"]))
        batch = largest_batch(store, 1024)
        rows, tokens = batch.mask.shape
        work = plain.flops.token * rows * tokens + plain.flops.pair * rows * tokens**2 + plain.flops.row * rows
        kept.append((name, teacher, batch, work))
    taken: dict[str, list[float]] = {name: [] for name in SHAPES}
    for _ in range(rounds + 1):
        for name, teacher, batch, _ in kept:
            start = time.perf_counter()
            teacher.start(batch).arrays()
            taken[name].append(time.perf_counter() - start)
    seconds = {name: min(each[1:]) for name, each in taken.items()}
    name, _, _, work = kept[0]
    speed = work / seconds[name]
    return {
        "flops_a_second": round(speed),
        "seconds": {
            name: {
                "predicted": round(work / speed, 4),
                "measured": round(seconds[name], 4),
                "error": round(work / speed / seconds[name] - 1, 3),
            }
            for name, _, _, work in kept
        },
    }


def shardings(folder: Path) -> dict[str, Any]:
    """What a rank of two holds, and the most that it takes while it answers: its batch, and weights of the other."""
    found: dict[str, Any] = {}
    for name in ("bert", "llama, wider"):
        recipe = recipe_of(folder, name, FEATURES["last hidden"])
        _, plain, store, amount = teacher_of(recipe)
        batch = largest_batch(store, 1024)
        rows, tokens = batch.mask.shape
        for kind in ("zero3", "fsdp", "tp"):
            launch(2, [__file__, "--rank", kind, "--shape", name, "--folder", str(folder)], grace=0.0)
            ranks = [json.loads((folder / f"rank{number}.json").read_text()) for number in range(2)]
            sharding = Sharding(kind=kind, size=2)
            gathered = GATHERED[sharding.kind](plain, rows * tokens)
            found[f"{name}; {kind}"] = {
                "held": compared(held(plain, sharding), max(rank["held"] for rank in ranks)),
                "gathered_and_batch": compared(
                    gathered + plain.batch_bytes(rows, tokens, int(batch.labelled.sum())), max(rank["peak"] for rank in ranks)
                ),
                "batch_alone": batch_bytes(plain, amount, rows * tokens),
                "received_bytes_a_second": round(statistics.mean(rank["link"] for rank in ranks)),
            }
    return found


def as_rank(kind: Kind, name: str, folder: Path) -> None:
    """One of two ranks."""
    recipe = recipe_of(folder, name, FEATURES["last hidden"], Sharding(kind=kind, size=2))
    _, requests = requested(recipe)
    with joined(2, grouped=True) as replica:
        store = Store.open(recipe.store)
        teacher = load_pass(recipe, requests, store.rows, provenance(sys.argv), replica)
        batch = largest_batch(store, 1024)
        taken = peak(lambda: teacher.start(batch))
        held_bytes = teacher.loaded.weights.local_elements() * 4
        (folder / f"rank{replica.rank}.json").write_text(json.dumps({"held": held_bytes, "peak": taken, "link": _link()}))


def _link() -> float:
    """Bytes a second that this rank receives from the other."""
    mine = torch.zeros(1 << 21)
    whole = torch.zeros(2, 1 << 21)
    rates = []
    for _ in range(4):
        dist.barrier()
        start = time.perf_counter()
        dist.all_gather([*whole], mine)
        rates.append(mine.nbytes / (time.perf_counter() - start))
    return max(rates)


def main() -> None:
    """Measure all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if options.rank:
        as_rank(options.rank, options.shape, options.folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_models(folder)
        found = {
            "machine": machine(),
            "memory_and_work": memory_and_work(folder),
            "shardings": shardings(folder),
            "times": times(folder, options.rounds),
            "gpu": "not measured",
        }
    save(options.save, "scale", found)


if __name__ == "__main__":
    main()
