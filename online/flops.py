"""What a forward pass computes, in floating-point operations, and what GPUs can do at most: the two halves of MFU.

A matrix product of [m, k] and [k, n] takes 2mkn operations: 2 for each weight of a linear layer and token. Attention takes
2 * T * width for query * key and as many for probabilities * value, for each token of a row of T padded tokens and each
block; what a mask hides is computed all the same, and counts. Norms, activations and softmax are left out, as is usual
(Kaplan et al. 2020, arXiv 2001.08361, section 2.1; Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from online.models import HEADS, LM_HEADS, CustomModules, LoadedModel, model_shape
from store.shape import Head


@dataclass(frozen=True)
class ForwardFlops:
    """Operations of one forward pass, to be multiplied with what is fed to it. A mixture of experts counts with all experts."""

    token: int
    """For each padded token: all linear layers that every token goes through."""
    pair: int
    """For each pair of padded tokens of one row: attention of all blocks."""
    row: int
    """For each row: poolers and heads that answer for a whole row."""
    word: int
    """For each token whose word logits are asked for; the dump feeds the language-model head no others."""

    def rows(self, lengths: Sequence[int], words: int = 0) -> int:
        """Operations of a batch of rows with padded ``lengths``, ``words`` tokens of which go through the language-model head."""
        tokens, pairs = sum(lengths), sum(length * length for length in lengths)
        return self.token * tokens + self.pair * pairs + self.row * len(lengths) + self.word * words


def forward_flops(
    config: PreTrainedConfig, head: Head, custom: CustomModules | None = None, trust_remote_code: bool = False
) -> ForwardFlops:
    """Operations of the model that ``config`` describes; its weights are not needed, and no memory for them.

    Raises:
        ValueError: as online.models.model_shape.
    """
    shape = model_shape(config, head, custom)
    options = {} if custom is None else {"trust_remote_code": trust_remote_code}
    config = copy.deepcopy(config)  # transformers writes to it
    with torch.device("meta"):
        model = HEADS[head].from_config(config, **options)  # type: ignore[attr-defined]
    loaded = LoadedModel.of(model, head, custom=custom)
    blocks = sum(_weights(loaded.block(layer)) for layer in range(1, shape.layers + 1))
    words = 0 if loaded.word_head is None else _weights(loaded.word_head)
    below = () if custom is not None else ("embeddings", "embeddings_project")  # MobileBERT's hold a linear layer, ELECTRA has one
    of_each_token = sum(_weights(module) for name in below if (module := getattr(loaded.body, name, None)) is not None)
    rest = _weights(model) - blocks - words - of_each_token
    of_rows = head not in LM_HEADS and head != "token_classification" and not shape.causal  # decoders score each token
    return ForwardFlops(
        token=2 * (blocks + of_each_token + (0 if of_rows else rest)),
        pair=4 * shape.layers * (shape.heads * shape.head_width or shape.width),
        row=2 * rest if of_rows else 0,
        word=2 * words,
    )


def _weights(root: nn.Module) -> int:
    """Weights that are multiplied with activations below ``root``."""
    linear = (module.weight for module in root.modules() if isinstance(module, nn.Linear | Conv1D))
    return sum(weight.numel() for weight in linear)


_16_BIT, _HALF_ONLY = ("bfloat16", "float16"), ("float16",)

_PEAKS: tuple[tuple[str, tuple[str, ...], float, float], ...] = (
    (r"\bB200\b", _16_BIT, 2250e12, 75e12),  # HGX B200 datasheet, an eighth of it, without sparsity
    (r"\bH200 NVL\b", _16_BIT, 835e12, 60e12),  # H200 datasheet; half of the figure with sparsity, as for H100
    (r"\bH200\b", _16_BIT, 989e12, 67e12),
    (r"\bH100 NVL\b", _16_BIT, 835e12, 60e12),  # H100 datasheet
    (r"\bH100 PCIe\b", _16_BIT, 756e12, 51e12),
    (r"\bH100\b", _16_BIT, 989e12, 67e12),
    (r"\bA100\b", _16_BIT, 312e12, 19.5e12),  # A100 datasheet
    (r"\bA10\b", _16_BIT, 125e12, 31.2e12),  # A10 datasheet
    (r"\bL40S\b", _16_BIT, 362e12, 91.6e12),  # L40S datasheet
    (r"\bL4\b", _16_BIT, 121e12, 30.3e12),  # L4 datasheet
    (r"\bV100-PCIE\b", _HALF_ONLY, 112e12, 14e12),  # V100 datasheet
    (r"\bV100-SXM", _HALF_ONLY, 125e12, 15.7e12),
    (r"\bT4\b", _HALF_ONLY, 65e12, 8.1e12),  # T4 datasheet
)
"""Pattern of the device's name, the 16-bit types it multiplies, and its dense peak in them and in float32 (without TF32, which torch
leaves off), in operations a second; from NVIDIA's datasheets."""


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Operations a second that a GPU can do at most in ``dtype`` (float32, bfloat16, float16), by its name; None where unknown."""
    if "MIG" in device_name:  # a slice of a GPU
        return None
    for pattern, types, in_16_bits, in_32_bits in _PEAKS:
        if re.search(pattern, device_name):
            return in_32_bits if dtype == "float32" else in_16_bits if dtype in types else None
    return None
