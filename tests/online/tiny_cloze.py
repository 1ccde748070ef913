"""A tiny masked language model with a tokenizer that cuts some words, and what it answers, worked out one word at a time."""

import copy
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from online.models import LoadedModel

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    *("the", "a", "in", "of", "and", "river", "city", "people", "old", "new", "small", "great"),
    *("water", "house", "green", "light", "road", "stone", "field", "north", "south", "good", "bad"),
]
OTHERS = ["word1", "2", ".", ",", "'", "-", "##s", "##ing", "##er"]
"""Tokens that are no whole words."""
LENGTH = 40


def make_tokenizer(mask: bool = True) -> PreTrainedTokenizerFast:
    """WordPiece of small letters."""
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS + OTHERS)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **({"mask_token": "[MASK]"} if mask else {}))


def make_model(tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    """A random BERT with noise on every weight, so that words, places and padding all matter."""
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=LENGTH, pad_token_id=0,
    )  # fmt: skip
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return LoadedModel.of(model, "masked_lm", tokenizer)


def likeliest(loaded: LoadedModel, tokens: list[str], place: int, words: list[str], count: int) -> tuple[str, ...]:
    """The likeliest of ``words`` at ``place`` of ``tokens``, which have no padding: float64, one row, transformers alone."""
    model: Any = copy.deepcopy(loaded.model).double()
    tokenizer: Any = loaded.tokenizer
    masked = [token if number != place else tokenizer.mask_token for number, token in enumerate(tokens)]
    ids = tokenizer.convert_tokens_to_ids([tokenizer.cls_token, *masked, tokenizer.sep_token])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, place + 1]
    return tuple(sorted(words, key=lambda word: -float(logits[tokenizer.convert_tokens_to_ids(word)]))[:count])
