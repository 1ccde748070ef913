"""Peak memory and time of a dump and of a training step with rows of 4,096 to 32,768 tokens.

    python benchmarks/long_context.py [--tokens 4096 16384 32768] [--packed 4096 16384] [--save benchmarks/results]

A random Llama of two blocks, 64 wide, with 32,000 words answers for two rows, batch by batch of one row, and a random student of one block
learns from what is stored (the head's input at all tokens), by text and by all of the teacher's words, in two steps of one row; on the CPU,
each in a process of its own. "whole" rows are one document each; "packed" ones are documents of 512 tokens, whose masks are the square of a
row's length. Memory is the most that was resident, less what was before the model was loaded; in megabytes. Seconds are those of the whole
command, loading included, on a machine that does other things too.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import machine, save
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from store.strict import parse
from student_train.recipe import TrainRecipe
from student_train.run import run
from teacher_dump.dump import build_rows, dump
from teacher_dump.recipe import DumpRecipe

WORDS, DOCUMENT, ROWS, STEPS = 32_000, 512, 2, 2
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 176}


def main() -> None:
    """Every case, each in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 16384, 32768])
    parser.add_argument("--packed", type=int, nargs="*", default=[4096, 16384])
    parser.add_argument("--save", type=Path)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        what, folder, tokens = options.case
        print(json.dumps(measured(what, Path(folder), int(tokens))))
        return
    figures: dict[str, Any] = {}
    for kind, lengths in (("whole", options.tokens), ("packed", options.packed)):
        for tokens in lengths:
            with tempfile.TemporaryDirectory() as name:
                write(Path(name), tokens, packed=kind == "packed")
                for what in ("dump", "train"):
                    figures[f"{what}, {kind}, {tokens} tokens"] = found = case(what, Path(name), tokens)
                    print(what, kind, tokens, found, flush=True)
            if options.save:
                setting = {"model": SIZES, "words": WORDS, "rows": ROWS, "steps": STEPS, "machine": machine()}
                save(options.save, "long_context", {"setting": setting, "cases": figures})


def case(what: str, folder: Path, tokens: int) -> dict[str, float]:
    """Measure in a fresh process."""
    command = [sys.executable, __file__, "--case", what, str(folder), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(what: str, folder: Path, tokens: int) -> dict[str, float]:
    """Memory and seconds of one command in this process."""
    torch.set_num_threads(1)
    before, started = peak(), time.monotonic()
    if what == "dump":
        dump(dump_recipe(folder, tokens), sys.argv)
    else:
        run(train_recipe(folder), sys.argv)
    return {"peak_mb": round(peak() - before), "before_mb": round(before), "seconds": round(time.monotonic() - started, 1)}


def peak() -> float:
    """The most that this process and those that it started had resident, in megabytes."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024


def write(folder: Path, tokens: int, *, packed: bool) -> None:
    """Teacher, tokenizer, texts and rows."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=WORDS, max_position_embeddings=tokens, **SIZES)  # type: ignore[arg-type]
    LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w1").save_pretrained(folder / "teacher")
    drawn, length = np.random.default_rng(0), DOCUMENT if packed else tokens
    texts = [" ".join(f"w{word}" for word in drawn.integers(2, WORDS, length)) for _ in range(ROWS * tokens // length)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "kind").write_text("pack" if packed else "truncate")
    build_rows(dump_recipe(folder, tokens), sys.argv)


def dump_recipe(folder: Path, tokens: int) -> DumpRecipe:
    """The teacher's words at all tokens, a row at a time."""
    made = {
        "store": str(folder / "store"),
        "pass_name": "teacher",
        "teacher": {"model": str(folder / "teacher"), "head": "causal_lm"},
        "rows": {
            "sources": [{"files": str(folder / "text.jsonl")}],
            "objective": "causal",
            "max_length": tokens,
            "long": (folder / "kind").read_text(),
            "slot_tokens": max(32768, tokens),
        },
        "features": ["lm_logits@labels"],
        "batch_tokens": tokens,
        "device": "cpu",
    }
    return parse(DumpRecipe, made, "recipe")


def train_recipe(folder: Path) -> TrainRecipe:
    """Two steps of one row each, in this process."""
    phase = {
        "name": "only",
        "student": {"random": {"num_hidden_layers": 1}, "source": str(folder / "teacher")},
        "methods": [{"name": "lm_loss", "weight": 0.5}, {"name": "lm_kd", "weight": 0.5}],
        "data": [{"store": str(folder / "store"), "pass_name": "teacher"}],
        "steps": STEPS,
        "batch_rows": 1,
        "trainer": {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "save_strategy": "no", "logging_steps": 1},
    }
    return parse(TrainRecipe, {"output": str(folder / "out"), "phases": [phase]}, "recipe")


if __name__ == "__main__":
    main()
