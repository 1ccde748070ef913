"""Prompts with responses for causal students: a corpus, a teacher that is small enough for tests, and a store of rows; run as a script by
tests that need ranks.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from online.models import HEADS, ModelSpec, load_model
from store.reader import Store
from store.strict import parse
from student_train.bundle import Bundle
from student_train.data import Source
from student_train.live import answering, load_live
from student_train.methods import parse_method
from student_train.recipe import TrainRecipe
from student_train.train import TrainResult, train
from teacher_dump.dump import build_rows, dump
from teacher_dump.recipe import DumpRecipe

WORDS = ["<pad>", "<unk>", "<eos>", *(f"w{number}" for number in range(21))]
"""The vocabulary; <eos> is 2."""
QUIET = {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "logging_steps": 1, "learning_rate": 1e-3}


def llama(vocabulary: int = len(WORDS), positions: int = 64, **sizes: int) -> PreTrainedConfig:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    return LlamaConfig(
        **{**small, **sizes}, vocab_size=vocabulary, max_position_embeddings=positions, pad_token_id=0, bos_token_id=None, eos_token_id=2
    )


def gpt2(vocabulary: int = len(WORDS), **sizes: int) -> PreTrainedConfig:
    small = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, **sizes}
    return GPT2Config(**small, vocab_size=vocabulary, pad_token_id=0, bos_token_id=None, eos_token_id=2)


def write_model(folder: Path, config: PreTrainedConfig, seed: int) -> Path:
    """A random causal model with noise on every weight, and the tokenizer."""
    torch.manual_seed(seed)
    model = HEADS["causal_lm"].from_config(config)  # type: ignore[attr-defined]
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    return folder


def write_rows(folder: Path) -> None:
    """``folder``/store: 24 prompts of two to seven words with responses of up to six, and 12 more of split dev."""
    numbers = np.random.default_rng(5)

    def words(least: int, most: int) -> str:
        return " ".join(f"w{number}" for number in numbers.integers(0, 21, numbers.integers(least, most + 1)))

    for split, count in (("train", 24), ("dev", 12)):
        lines = [json.dumps({"prompt": words(1, 6), "response": words(0, 6)}) for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    build_rows(_dump_recipe(folder), ["tests"])


def write_pass(folder: Path) -> None:
    """The answers of ``folder``/teacher to the rows of ``folder``/store, as its pass ``tiny``."""
    dump(_dump_recipe(folder), ["tests"])


def _dump_recipe(folder: Path) -> DumpRecipe:
    sources = [{"files": str(folder / f"{split}.jsonl"), "split": split} for split in ("train", "dev")]
    made = {
        "store": str(folder / "store"),
        "rows": {"sources": sources, "text": "{prompt} w0 {response}", "objective": "causal", "response": "response", "max_length": 16},
        "teacher": {"model": str(folder / "teacher"), "head": "causal_lm"},
        "features": ["lm_logits@labels"],
        "pass_name": "tiny",
    }
    return parse(DumpRecipe, made, "recipe")


def recipe(folder: Path, output: Path, methods: list[dict[str, Any]], changes: dict[str, Any] | None = None) -> TrainRecipe:
    """Four steps of 8 rows of ``folder``/store with ``folder``/teacher at work."""
    data = {"store": str(folder / "store")}
    phase: dict[str, Any] = {
        "name": "only", "student": {"model": {"model": str(folder / "student"), "head": "causal_lm"}}, "methods": methods, "data": [data],
        "teacher": {"online": {"model": str(folder / "teacher"), "head": "causal_lm"}}, "steps": 4, "batch_rows": 8,
        **(changes or {}),
    }  # fmt: skip
    phase["trainer"] = {**QUIET, **phase.get("trainer", {})}
    return parse(TrainRecipe, {"output": str(output), "phases": [phase]}, "recipe")


def train_once(
    folder: Path, output: Path, methods: list[dict[str, Any]], changes: dict[str, Any] | None = None, *, split: str = "train"
) -> tuple[Bundle, TrainResult]:
    """Train what ``recipe`` says in this process, from the newest checkpoint in ``output``; methods that ask get split dev as ``meta``."""
    loop = {"trainer": {"save_total_limit": 9, "save_steps": 3}, "steps": 6}
    phase = recipe(folder, output, methods, {**loop, **(changes or {})}).phases[0]
    student = load_model(ModelSpec(model=folder / "student", head="causal_lm"))
    teachers = load_live(phase.live, 16, torch.device("cpu"))
    built = [(spec, parse_method(spec.name, dict(spec.options), student.shape, teachers[""].shape)) for spec in phase.methods]
    bundle = Bundle(student, built)
    bundle.attach(teachers)
    keys = frozenset(key for _, method in built for key in method.teacher_keys)
    teacher, store = answering(teachers, {"": keys}, phase.live), Store.open(folder / "store")
    meta = Source(store, teacher, "dev") if any(method.reads_meta for _, method in built) else None
    return bundle, train(bundle, [Source(store, teacher, split)], phase, output, 3, None, meta)


def main(runs: str) -> None:
    """Train once for each of ``runs``, a JSON list of ``train_once``'s arguments."""
    torch.set_num_threads(1)
    for options in json.loads(runs):
        train_once(Path(options["folder"]), Path(options["output"]), options["methods"], options.get("changes"))


if __name__ == "__main__":
    main(sys.argv[1])
