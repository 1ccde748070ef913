"""Tiny random models of every family, and one set of documents in every layout of a batch."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MobileBertConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from online.batch import IGNORED, Batch
from online.models import HEADS
from store.shape import Head

sys.path.insert(0, str(Path(__file__).parent))  # on_ranks.py and others are shared

VOCAB, PAD, LAYERS = 61, 1, 3
LENGTHS = (11, 7, 4)

_BERT = {"vocab_size": VOCAB, "pad_token_id": PAD, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 40}  # fmt: skip
_LLAMA = {**_BERT, "num_key_value_heads": 2, "head_dim": 12, "bos_token_id": 2, "eos_token_id": 3, "tie_word_embeddings": False}
_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 10}
_MOBILE = {**_BERT, "embedding_size": 12, "layer_norm_eps": 1e-6}
_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: BertConfig(**_BERT),
    "electra": lambda: ElectraConfig(**_BERT, embedding_size=12),
    "roberta": lambda: RobertaConfig(**_BERT, type_vocab_size=1),
    "xlm-roberta": lambda: AutoConfig.for_model("xlm-roberta", **_BERT),
    "distilbert": lambda: DistilBertConfig(vocab_size=VOCAB, pad_token_id=PAD, dim=32, n_layers=LAYERS, n_heads=4, hidden_dim=48),
    "mobilebert": lambda: MobileBertConfig(**_MOBILE, intra_bottleneck_size=16),  # as published: trigrams, shared bottleneck, NoNorm
    "mobilebert, inverted": lambda: MobileBertConfig(
        **_MOBILE, intra_bottleneck_size=64, num_feedforward_networks=1, normalization_type="layer_norm", hidden_act="gelu"
    ),
    "mobilebert, attention in the bottleneck": lambda: MobileBertConfig(
        **_MOBILE, intra_bottleneck_size=16, use_bottleneck_attention=True, trigram_input=False
    ),
    "mobilebert, no bottleneck": lambda: MobileBertConfig(**_MOBILE, use_bottleneck=False, classifier_activation=False),
    "modernbert": lambda: ModernBertConfig(**_BERT, local_attention=6, norm_bias=True, attention_bias=True, classifier_bias=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, pad_token_id=PAD, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=40, scale_attn_by_inverse_layer_idx=True
    ),
    "llama": lambda: LlamaConfig(**_LLAMA, attention_bias=True, rope_parameters=_YARN),
    "mistral": lambda: MistralConfig(**_LLAMA, sliding_window=4),
    "qwen2": lambda: Qwen2Config(**{**_LLAMA, "head_dim": 8}, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**_LLAMA),
    "gemma": lambda: GemmaConfig(**_LLAMA),
    "gemma2": lambda: Gemma2Config(
        **_LLAMA, sliding_window=4, layer_types=_TYPES, query_pre_attn_scalar=7, attn_logit_softcapping=2.0, final_logit_softcapping=1.5
    ),
    "gemma3_text": lambda: Gemma3TextConfig(
        **_LLAMA, sliding_window=4, layer_types=_TYPES, query_pre_attn_scalar=7, attn_logit_softcapping=2.0, final_logit_softcapping=1.5
    ),
    "gemma3_text, bidirectional": lambda: Gemma3TextConfig(
        **_LLAMA, sliding_window=6, layer_types=_TYPES, use_bidirectional_attention=True
    ),
}

Place = tuple[Tensor, int, slice]
"""A document's token ids, its row, and where in the row it stands."""


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """``tiny_model(name, head, attention="eager")``: random, with noise on every weight, biases and norms included."""

    def make(name: str, head: Head, attention: str = "eager") -> PreTrainedModel:
        torch.manual_seed(0)
        config = CONFIGS[name]()
        config.num_labels = 3
        model = HEADS[head].from_config(config, attn_implementation=attention).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.15)
        return model

    return make


@pytest.fixture(scope="session")
def lay_out() -> Callable[[str], tuple[Batch, list[Place]]]:
    """``lay_out(kind)``: documents of 11, 7 and 4 tokens padded on the ``right`` or ``left``, or ``packed`` in two rows."""

    def make(kind: str) -> tuple[Batch, list[Place]]:
        generator = torch.Generator().manual_seed(7)
        texts = [torch.randint(4, VOCAB, (length,), generator=generator) for length in LENGTHS]
        packed = kind == "packed"
        rows, length = ([texts[:2], texts[2:]], sum(LENGTHS[:2])) if packed else ([[text] for text in texts], 16)
        ids = torch.full((len(rows), length), PAD)
        mask, numbers, positions = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids), torch.zeros_like(ids)
        places = []
        for row, members in enumerate(rows):
            start = length - len(members[0]) if kind == "left" else 0
            for number, text in enumerate(members):
                place = slice(start, start + len(text))
                ids[row, place], mask[row, place], numbers[row, place], positions[row, place] = text, True, number, torch.arange(len(text))
                places.append((text, row, place))
                start += len(text)
        labels = torch.where(mask & (ids % 3 == 0), ids, IGNORED)
        order = torch.arange(len(rows))
        return Batch(order, ids, mask, None, numbers if packed else None, positions if packed else None, labels, None, order), places

    return make


@pytest.fixture(scope="session")
def bert() -> PreTrainedTokenizerFast:
    from text_rows import bert_tokenizer

    return bert_tokenizer()


@pytest.fixture(scope="session")
def gpt() -> PreTrainedTokenizerFast:
    from text_rows import gpt_tokenizer

    return gpt_tokenizer()
