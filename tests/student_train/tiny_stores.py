"""Small real stores for tests: a teacher from a configuration, a handful of sentences, the real dump."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast

from online.models import HEADS
from store.shape import Head
from teacher_dump.dump import dump
from teacher_dump.recipe import DumpRecipe

WORDS = (
    "the",
    "a",
    "film",
    "was",
    "is",
    "very",
    "not",
    "good",
    "bad",
    "fine",
    "dull",
    "great",
    "plot",
    "actor",
    "scene",
    "long",
    "short",
    "I",
    "we",
    "liked",
    "hated",
    "it",
    "and",
    "but",
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def write_teacher(folder: Path, head: Head, labels: int = 2, layers: int = 4) -> Path:
    """A random BERT with noise on every weight."""
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, num_labels=labels,
    )  # fmt: skip
    model = HEADS[head].from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_text(folder: Path, rows: int = 40, seed: int = 0) -> tuple[Path, Path]:
    """Random sentences with random classes, by threes to a question: a file to train on and one to measure on."""
    generator = torch.Generator().manual_seed(seed)
    files = []
    for split, number in (("train", rows), ("dev", rows // 2)):
        lines = []
        for row in range(number):
            text, other = (" ".join(_words(generator)) for _ in range(2))
            label = int(torch.randint(2, (1,), generator=generator))
            lines.append({"text": text, "other": other, "label": label, "question": row // 3})
        file = folder / f"{split}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        files.append(file)
    return files[0], files[1]


def _words(generator: torch.Generator) -> list[str]:
    length = int(torch.randint(2, 7, (1,), generator=generator))
    return [WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist()]


def write_store(folder: Path, head: Head, features: list[str], **rows: object) -> Path:
    """``folder/store`` with the pass ``tiny``, whose teacher in ``folder/teacher`` ships blocks 2 and 4."""
    folder.mkdir(parents=True, exist_ok=True)
    train, dev = write_text(folder)
    teacher = write_teacher(folder / "teacher", head)
    recipe = {
        "store": folder / "store",
        "pass_name": "tiny",
        "teacher": {"model": teacher, "head": head},
        "rows": {
            "sources": [{"files": [str(train)], "split": "train"}, {"files": [str(dev)], "split": "dev"}],
            "max_length": 16,
            "slot_tokens": 256,
            **({"label": {"column": "label", "classes": ["negative", "positive"]}} if head == "classification" else {}),
            **rows,
        },
        "features": features,
        "ship_layers": [2, 4],
        "device": "cpu",
    }
    dump(DumpRecipe.model_validate(recipe), ("tests",))
    return folder / "store"


def write_clozes(folder: Path, padding: bool = False) -> Path:
    """The same with a masked language model, whose rows are clozes; with ``padding`` all of 16 tokens."""
    label = {"column": "label", "classes": ["negative", "positive"]}
    cloze = {"text": "{text} it was {mask}", "cloze": {"words": ["bad", "good"]}, "objective": "mlm"}
    return write_store(folder, "masked_lm", ["lm_logits@all"], label=label, padding=padding, **cloze)
