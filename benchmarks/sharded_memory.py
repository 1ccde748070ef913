"""Memory of each rank while a model is loaded and run, whole and sharded: JSON on standard output, and with --save kept in it.

    python benchmarks/sharded_memory.py [--kinds none zero3 fsdp tp] [--ranks 1 2] [--dtype bfloat16]
        [--save benchmarks/results/sharded_memory.json]

A Llama of random weights is written to a temporary folder (350 million in float32: 1.4 GB) and loaded by 1, 2, ... processes on the CPU.
Figures are anonymous resident memory (RssAnon), in megabytes, seen every 2 ms: weights that are mapped from their files show in no
such figure. So are those of a whole model, and slices of fsdp, unless another dtype makes them copies. "base" is the process before
loading. glibc is told to give freed memory back at once.
"""

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from online.batch import Batch
from online.models import ModelSpec, forward, load_model
from online.replica import joined
from online.sharding import Sharding
from store.provenance import provenance

SHAPE = {"vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 22, "num_attention_heads": 16}
ROWS, TOKENS, PASSES = 2, 64, 4
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


def anonymous() -> float:
    """Anonymous resident memory of this process in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


@contextmanager
def peak(found: dict[str, float], name: str) -> Iterator[None]:
    """Note the highest memory that is seen inside."""
    seen, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        found[name] = round(max(*seen, anonymous()))


def main(arguments: dict[str, Any]) -> dict[str, float]:
    """One rank."""
    torch.set_num_threads(1)
    sharding = Sharding.model_validate(arguments["sharding"])
    with joined(sharding.size, grouped=True):
        found: dict[str, float] = {"base": round(anonymous())}
        with peak(found, "peak while loading"):
            loaded = load_model(ModelSpec(model=Path(arguments["folder"]), head="causal_lm", dtype=arguments["dtype"]), sharding=sharding)
        found["after loading"] = round(anonymous())
        order, ids = torch.arange(ROWS), torch.randint(4, SHAPE["vocab_size"], (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
        batch = Batch(order, ids, torch.ones_like(ids, dtype=torch.bool), None, None, None, None, None, order)
        with peak(found, "peak in forward passes"), torch.no_grad():
            for _ in range(PASSES):
                forward(loaded, batch)
        found["elements of weights"] = loaded.weights.local_elements()
        dist.barrier()
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["none", "zero3", "fsdp", "tp"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype that the float32 files are read in")
    parser.add_argument("--save", type=Path, help="JSON to put the figures in; those of other kinds stay")
    return parser


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "online"))
    from on_ranks import run_on_ranks

    options = _parser().parse_args()
    before = json.loads(options.save.read_text()) if options.save is not None and options.save.exists() else {"made": [], "kinds": {}}
    kept = before["kinds"]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, pad_token_id=1, tie_word_embeddings=False))
        parameters = model.num_parameters()
        model.save_pretrained(folder, max_shard_size="300MB")
        del model
        for kind in options.kinds:
            alone = kind in ("none", "zero3")
            for count in [1] if kind == "none" else [count for count in options.ranks if count > 1 or alone]:
                sharding = {"kind": kind, "size": count}
                asked = {"folder": folder, "sharding": sharding, "dtype": options.dtype}
                ranks = run_on_ranks(count, Path(__file__), asked, timeout=500, environment=MALLOC)
                kept.setdefault(kind if options.dtype == "float32" else f"{kind}, read as {options.dtype}", {})[str(count)] = ranks
    result = {
        "made": [*before["made"], provenance(sys.argv).model_dump(mode="json")],
        "parameters": parameters,
        "megabytes of weights": round(parameters * 4 / 2**20),
        "rows": ROWS,
        "tokens": TOKENS,
        "kinds": kept,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.save is not None:
        options.save.write_text(text + "\n")
