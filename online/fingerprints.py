"""Fingerprints by content: of weights as they run, and of a tokenizer."""

import hashlib
import json

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from online.kept_words import kept_words
from online.sharding import Weights

_NO_COMPUTATION = frozenset(
    {
        "architectures",
        "auto_map",
        "dtype",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Entries of a configuration that leave a forward pass as it is; the dtype is that of the weights themselves."""


def weights_fingerprint(model: PreTrainedModel, weights: Weights) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all weights, the configuration that shapes the computation, and the words that
    a model with a smaller vocabulary keeps.

    Sharded weights are gathered one after the other, so that the fingerprint is that of the model on one rank.
    """
    digest = hashlib.sha256()
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NO_COMPUTATION and name[0] != "_"}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, lying in sorted(model.state_dict(keep_vars=True).items()):
        tensor = weights.whole(lying)
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if (words := kept_words(model)) is not None:
        digest.update(words.fingerprint.encode())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over vocabulary, added and special tokens, normalisation, splitting, post-processing and chat template.

    Truncation and padding are not part of it: they are set anew by every call.
    """
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content = {name: value for name, value in content.items() if name not in ("truncation", "padding")}
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    content = [content, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
