"""Tiny tokenizers, and rows from a few lines of text."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from online.rows import iter_groups
from online.rows_spec import RowsSpec
from store.rows import Row
from store.strict import parse

WORDS = """the a man girl turned on faucet water flowed from toilet filled class temper real professional emerging lost he him it was
    not nice ! . , ? bernard who old said rome paris lives in city play ##ing ##ed"""
WIC_SPANS = [{"field": "sentence1", "start": "start1", "end": "end1"}, {"field": "sentence2", "start": "start2", "end": "end2"}]


def vocabulary(*words: str) -> dict[str, int]:
    """Distinct ids: two WordPiece tokens with one id break silently when saved and loaded."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    found = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters, *(f"##{letter}" for letter in letters)])
    return {word: number for number, word in enumerate(found)}


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece with [CLS], [SEP] and segments."""
    words = vocabulary(*WORDS.split())
    inner = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = [(name, words[name]) for name in ("[CLS]", "[SEP]")]
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=specials
    )
    inner.decoder = decoders.WordPiece()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names)


def gpt_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without special tokens around a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: number for number, letter in enumerate([*letters, "he", "Ġt", "Ġthe", "<|end|>"])}
    inner = Tokenizer(models.BPE(words, [("h", "e"), ("Ġ", "t"), ("Ġt", "he")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", bos_token="<|end|>", model_input_names=["input_ids"])


def jsonl(path: Path, rows: Iterable[dict[str, object]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def spec(files: str, **options: object) -> RowsSpec:
    return parse(RowsSpec, {"sources": [{"files": files}], **options}, "recipe")


def rows(spec: RowsSpec, tokenizer: PreTrainedTokenizerFast, read_rows: int = 1024) -> list[Row]:
    return [row for group in iter_groups(spec, tokenizer, read_rows=read_rows) for row in group]


def tokens(tokenizer: PreTrainedTokenizerFast, row: Row) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(row.input_ids.tolist()))


def marked(tokenizer: PreTrainedTokenizerFast, row: Row) -> list[str]:
    """The text under each span."""
    return [tokenizer.decode(row.input_ids[start:end].tolist()) for start, end in row.spans]


def same(left: list[Row], right: list[Row], but: tuple[str, ...] = ()) -> bool:
    return len(left) == len(right) and all(
        np.array_equal(getattr(a, name), getattr(b, name)) if isinstance(value, np.ndarray) else value == getattr(b, name)
        for a, b in zip(left, right, strict=True)
        for name, value in vars(a).items()
        if name not in but
    )
