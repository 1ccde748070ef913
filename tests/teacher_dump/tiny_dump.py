"""Tiny teachers with a real tokenizer, and what a folder holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast

from online.models import HEADS
from store.shape import Head

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    *("the", "a", "river", "city", "people", "old", "new", "small", "great", "water", "house", "green"),
    *("light", "road", "stone", "field", "north", "south", "good", "bad"),
    *[f"word{number}" for number in range(30)],
    "##s",
    "##ing",
]
VOCAB = len(SPECIAL) + len(WORDS)
LAYERS = 2

Tree = dict[str, Any]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def make_teacher(folder: Path, head: Head, seed: int) -> Path:
    """A random BERT with noise on every weight, saved with its tokenizer."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        num_labels=2,
        pad_token_id=0,
    )
    model = HEADS[head].from_config(config).eval()  # type: ignore[attr-defined]
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class World:
    """What dumps are made of."""

    masked: Path
    """A masked-LM teacher."""
    other: Path
    """A second one, with the same tokenizer."""
    classifier: Path
    corpus: Path
    """JSONL: text, label (negative or positive), and a number."""


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def files_of(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything below ``folder`` but locks: path -> inode, time of change, content."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix != ".lock"):
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (path.stat().st_ino, path.stat().st_mtime_ns if path.is_file() else 0, content)
    return found


def stored_bytes(store: Path) -> dict[str, bytes]:
    """What a dump of the same recipe must write alike: rows, tokens, features and weights."""
    kept = {path: content for path, (_, _, content) in files_of(store).items() if content}
    return {path: content for path, content in kept.items() if not path.startswith(("manifest", "commits", "model"))}
