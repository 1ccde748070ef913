"""A real store of text over 400 words, of which some come much more often than others, for tests of smaller vocabularies."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

from online.models import HEADS
from store.shape import Head
from teacher_dump.dump import dump
from teacher_dump.recipe import DumpRecipe

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = 400
PADDED = 410
"""Rows of the embedding: more than there are words, as in models whose table is padded."""
KEPT = 128
"""Words that stay at the rate .3: int(.3 * 410) = 123, rounded up."""
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of w5 to w399, in the last place of which stands Great, and before it great."""
    names = [*SPECIAL, *(f"w{number}" for number in range(5, WORDS))]
    names[-2:] = ["great", "Great"]
    words = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokens = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=words, **tokens)


def config(family: str, **changes: object) -> PreTrainedConfig:
    """A tiny configuration of ``family`` over PADDED words."""
    return AutoConfig.for_model(family, vocab_size=PADDED, pad_token_id=0, **{**SIZES, **changes})


def write_model(folder: Path, head: Head = "masked_lm", family: str = "bert", **changes: object) -> Path:
    """A model with noise on every weight, the bias of its word head too, and the tokenizer."""
    torch.manual_seed(5)
    model = HEADS[head].from_config(config(family, **changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_text(file: Path, rows: int = 60, seed: int = 0) -> Path:
    """Sentences in which w399 - n comes about as often as 1 / n: ranks run against ids."""
    generator = torch.Generator().manual_seed(seed)
    chances = 1 / torch.arange(1, WORDS - 4, dtype=torch.float64)
    lines = []
    for row in range(rows):
        drawn = torch.multinomial(chances, 9, replacement=True, generator=generator)
        lines.append({"text": " ".join(f"w{WORDS - 3 - int(number) % (WORDS - 7)}" for number in drawn), "label": "ab"[row % 2]})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def write_store(folder: Path, features: list[str], head: Head = "masked_lm", family: str = "bert", **rows: object) -> Path:
    """``folder/store`` with the pass ``tiny`` of the teacher in ``folder/teacher``, which ships all its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    train, dev = write_text(folder / "train.jsonl"), write_text(folder / "dev.jsonl", 20, 1)
    recipe = {
        "store": folder / "store",
        "pass_name": "tiny",
        "teacher": {"model": write_model(folder / "teacher", head, family), "head": head},
        "rows": {
            "sources": [{"files": [str(train)], "split": "train"}, {"files": [str(dev)], "split": "dev"}],
            "max_length": 16,
            "slot_tokens": 256,
            **({"objective": "mlm", "mask_probability": 0.3} if head == "masked_lm" else {}),
            **rows,
        },
        "features": features,
        "ship_layers": "all",
        "device": "cpu",
    }  # fmt: skip
    dump(DumpRecipe.model_validate(recipe), ("tests",))
    return folder / "store"
