"""Counted operations against what torch counts while tiny models run."""

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, PreTrainedModel

from online.batch import Batch, dense
from online.capture import Capture
from online.flops import forward_flops, peak_flops
from online.models import LM_HEADS, LoadedModel, forward
from store.features import FeatureKey
from store.shape import Head

ENCODERS = ("bert", "roberta", "distilbert", "mobilebert", "mobilebert, inverted", "electra", "modernbert")
FAMILIES = (*ENCODERS, "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")


def batch_of(rows: int, length: int, labelled: int) -> Batch:
    ids = torch.arange(rows * length).reshape(rows, length) % 50 + 4
    mask, labels = torch.ones_like(ids, dtype=torch.bool), torch.full_like(ids, -100)
    labels.view(-1)[:labelled] = 5
    order = torch.arange(rows)
    return Batch(order, ids, mask, None, None, None, labels, None, order)


def counted(loaded: LoadedModel, batch: Batch, keys: list[FeatureKey]) -> int:
    """Operations of linear layers and attention as torch counts them; rotary tables are products of matrices to it, which are taken out."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        with Capture(loaded, keys) as capture:
            forward(loaded, batch)
        found = capture.features(batch)
        for key in keys:
            dense(found, key)
    rotary = [counts for name, counts in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(sum(counts.values()) for counts in rotary)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("head", ["lm", "classification", "base"])
def test_operations_are_those_that_torch_counts(name: str, head: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    if (name, head) == ("gemma3_text", "classification"):
        pytest.skip("transformers has this head for the multimodal model only")
    decoder = name not in ENCODERS
    kind: Head = ("causal_lm" if decoder else "masked_lm") if head == "lm" else head  # type: ignore[assignment]
    model = tiny_model(name, kind)
    loaded = LoadedModel.of(model, kind)
    flops = forward_flops(model.config, kind)
    words = [FeatureKey.parse("lm_logits@labels")] if kind in LM_HEADS else []
    for rows, length, labelled in ((2, 16, 17), (3, 32, 19)):
        expected = counted(loaded, batch_of(rows, length, labelled), [FeatureKey.parse("hidden.1@all"), *words])
        assert flops.rows([length] * rows, labelled if words else 0) == expected


def test_a_model_too_large_for_this_machine_is_counted() -> None:
    config = LlamaConfig(
        hidden_size=16384, num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8, intermediate_size=53248, vocab_size=128256
    )
    flops = forward_flops(config, "causal_lm")
    block = 2 * 16384 * 16384 + 2 * 16384 * 1024 + 3 * 16384 * 53248
    assert flops.token == 2 * 126 * block
    assert flops.word == 2 * 16384 * 128256
    assert flops.pair == 4 * 126 * 16384


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA A100 80GB PCIe", "float32", 19.5e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "float16", 756e12),
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("NVIDIA L40", "bfloat16", None),
        ("NVIDIA A10G", "bfloat16", None),
        ("Tesla V100-SXM2-16GB", "float16", 125e12),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bfloat16", None),
        ("AMD Instinct MI300X", "bfloat16", None),
    ],
)
def test_the_peak_of_a_gpu_goes_by_its_name(name: str, dtype: str, peak: float | None) -> None:
    assert peak_flops(name, dtype) == peak
