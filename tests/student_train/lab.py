"""Tiny teachers of several families on disk, with text, and a store to which dumps add passes."""

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, ModernBertConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

from online.batch import bucket
from online.models import HEADS, ModelSpec, load_model
from online.planner import Units
from online.teacher import LiveTeacher
from store.features import FeatureKey
from store.intervention import Intervention
from store.reader import Store
from store.shape import Head
from store.strict import parse
from student_train.teacher import StoredTeacher
from teacher_dump.dump import build_rows, dump
from teacher_dump.recipe import DumpRecipe

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = tuple(f"w{number}" for number in range(59))
SIZES = {"vocab_size": len(SPECIAL) + len(WORDS), "pad_token_id": 0, "num_hidden_layers": 4, "num_attention_heads": 4,
         "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A teacher and rows for it.

    BLAS rounds products of few rows (on some processors of up to 15) in another way, so what a head makes of whole rows is
    compared where neither batch is that small.
    """

    head: Head
    config: Callable[..., PreTrainedConfig]
    rows: dict[str, Any]
    batch_tokens: int = 192
    batch_rows: int = 9


def qwen(**sizes: int) -> PreTrainedConfig:
    return Qwen3Config(**sizes, num_key_value_heads=2, head_dim=12, bos_token_id=2, eos_token_id=3, tie_word_embeddings=False)


LABELS = {"label": {"column": "label", "classes": ["a", "b", "c"]}, "domain": {"column": "genre", "classes": ["x", "y", "z"]}}
CLOZE = {"label": {"column": "label", "classes": ["a", "b", "c"]}, "cloze": {"words": ["w7", "w3", "w11"]}}
SETTINGS = {
    "mlm": Setting("masked_lm", BertConfig, {"objective": "mlm", "mask_probability": 0.4}),
    "pairs": Setting("masked_lm", BertConfig, {"objective": "mlm", "interchange": {"share": 0.5}}),
    "modern": Setting("masked_lm", lambda **sizes: ModernBertConfig(**sizes, local_attention=6), {"objective": "mlm"}),
    "cloze": Setting("masked_lm", BertConfig, {**CLOZE, "objective": "mlm", "text": "{text} w5 {mask}", "slot_tokens": 1024}, 1024, 17),
    "class": Setting("classification", BertConfig, {**LABELS, "slot_tokens": 1024}, 1024, 17),
    "causal": Setting("causal_lm", qwen, {"objective": "causal"}),
    "answers": Setting("causal_lm", qwen, {"objective": "causal", "text": "{genre} {label} {text}", "response": "text"}),
    "packed": Setting("causal_lm", qwen, {"objective": "causal", "long": "pack", "max_length": 32}),
}


KEPT: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "int8"},
    "float8": {"dtype": "float8"},
    "rounded": {"dtype": "bfloat16", "keep_bits": 4, "compression": "zstd"},
    "compressed": {"compression": "zstd"},
}
"""Ways to keep features, and what a dump's recipe says for them."""


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
        "eos_token": "[SEP]",
    }
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=["input_ids", "attention_mask"], **names)


def tiny_model(setting: Setting, layers: int, seed: int) -> PreTrainedModel:
    """A random model with noise on every weight."""
    torch.manual_seed(seed)
    config = setting.config(**{**SIZES, "num_hidden_layers": layers})
    config.num_labels = 3
    model = HEADS[setting.head].from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model


@dataclass
class Lab:
    """A teacher on disk, text, and one store to which dumps add passes."""

    folder: Path
    teacher: Path
    head: Head
    rows: dict[str, Any]
    batch_tokens: int
    batch_rows: int
    student: Callable[[], PreTrainedModel]

    def __post_init__(self) -> None:
        self.loaded = load_model(ModelSpec(model=self.teacher, head=self.head))
        self.shape = self.loaded.shape
        self.passes: dict[tuple[frozenset[FeatureKey], str, Intervention | None], str] = {}
        build_rows(self.recipe("none", ()), ("test",))
        self.store = self.reopened()

    def recipe(
        self, pass_name: str, features: Iterable[FeatureKey], kept: str = "float32", written: Intervention | None = None
    ) -> DumpRecipe:
        tree = {
            "store": str(self.folder / "store"), "pass_name": pass_name, **KEPT[kept], "batch_tokens": self.batch_tokens, "device": "cpu",
            "teacher": {"model": str(self.teacher), "head": self.head}, "rows": self.rows, "features": sorted(map(str, features)),
            "intervention": None if written is None else written.model_dump(),
        }  # fmt: skip
        return parse(DumpRecipe, tree, "test")

    def dump(self, wanted: frozenset[FeatureKey], kept: str = "float32", written: Intervention | None = None) -> StoredTeacher:
        """The stored teacher for ``wanted``, after its dump."""
        if (wanted, kept, written) not in self.passes:
            name = self.passes[wanted, kept, written] = f"pass-{len(self.passes)}"
            dump(self.recipe(name, wanted, kept, written), ("test",))
        return StoredTeacher(self.folder / "store", self.passes[wanted, kept, written], wanted)

    def live(self, wanted: frozenset[FeatureKey], written: Intervention | None = None) -> LiveTeacher:
        return LiveTeacher(self.loaded, wanted, Units.average(self.store.rows), written)

    def reopened(self) -> Store:
        """The store with all passes dumped so far."""
        return Store.open(self.folder / "store")

    def some_rows(self, padded: int | None) -> NDArray[np.int64]:
        """A batch of rows of one padded length, or of any, in random order; whole pairs where rows stand in pairs."""
        together = 2 if self.store.manifest.rows.paired else 1
        groups = np.random.default_rng(3).permutation(len(self.store.rows) // together)[:, None] * together + np.arange(together)
        lengths = self.store.rows.columns.length[groups].max(1)
        chosen = [group for group, length in zip(groups, lengths, strict=True) if padded in (None, bucket(int(length)))]
        return np.concatenate(chosen[: self.batch_rows // together])


def make_lab(folder: Path, name: str) -> Lab:
    """The setting ``name`` in ``folder``."""
    setting = SETTINGS[name]
    random = np.random.default_rng(0)
    lengths = random.permutation([*range(4, 14)] * 2 + [*range(17, 30)] * 2)
    texts = [" ".join(random.choice(WORDS, length)) for length in lengths]
    records = [{"text": text, "label": "abc"[n % 3], "genre": "xyz"[n % 7 % 3]} for n, text in enumerate(texts)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, records)))
    tiny_model(setting, 4, seed=1).save_pretrained(folder / "teacher")
    tokenizer().save_pretrained(folder / "teacher")
    rows = {"sources": [{"files": str(folder / "text.jsonl")}], "slot_tokens": 512, **setting.rows}
    student = functools.partial(tiny_model, setting, 2, seed=2)
    return Lab(folder, folder / "teacher", setting.head, rows, setting.batch_tokens, setting.batch_rows, student)
