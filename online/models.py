"""Load a Hugging Face folder, say what shape it has, and run it on a batch.

Shapes: B rows, T padded tokens.
"""

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ModelOutput

from online.batch import Batch
from online.families import FAMILIES, Family, attention_implementation, read_wiring, submodule, typed_windows
from online.fingerprints import weights_fingerprint
from online.kept_words import take_words, without_padding_beyond
from online.masks import causality_suffices, document_masks, running_positions, token_positions
from online.missing_weights import refuse_random_weights
from online.narrow_head import NarrowHead
from online.quantised import Quantised, is_quantised, quantisation
from online.quiet import quiet
from online.ranks import talking
from online.sharding import Sharding, ShardingError, Weights, Whole, loader
from online.trigrams import empty_padding
from store.shape import Head, ModelShape, Wiring
from store.strict import Strict, did_you_mean

HEADS: dict[Head, type] = {
    "base": AutoModel,
    "masked_lm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "multiple_choice": AutoModelForMultipleChoice,
}
LM_HEADS = ("masked_lm", "causal_lm")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


class CustomModules(Strict):
    """Where an architecture without an entry in online.families keeps its blocks; serves hidden, final and logits."""

    block: str = Field(pattern=r"\{i\}")
    """Path of block i from the whole model, with ``{i}`` counted from 0: ``transformer.blocks.{i}``."""
    layers: int = Field(ge=1)
    width: int = Field(ge=1)
    """Elements of a hidden state."""
    final_norm: str | None = None
    """Norm after the last block."""
    head: str | None = None
    """Linear language-model head; transformers' output embeddings by default."""


class ModelSpec(Strict):
    """A model on disk and how to run it."""

    model: Path
    """Hugging Face folder: config.json and safetensors weights."""
    head: Head
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    tokenizer: Path | None = None
    """Folder of the tokenizer; the model's own by default."""
    trust_remote_code: bool = False
    """Run Python code that lies in the model's folder."""
    labels: int | None = Field(default=None, ge=1)
    """Outputs of the task head; the folder's by default."""
    new_head: bool = False
    """Start with a random head where the folder holds none that fits (for fine-tuning); otherwise that is an error."""
    quantisation: dict[str, Any] = Field(default_factory=dict)
    """transformers' own quantisation, as in a config.json: {quant_method: fp8}, {quant_method: bitsandbytes, load_in_8bit: true}. Of
    teachers alone, on one rank. Folders that are quantised already say so themselves."""
    modules: CustomModules | None = None
    """Module paths of an architecture that TeacherCache does not know."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with all that is needed to read features from it."""

    model: PreTrainedModel
    shape: ModelShape
    wiring: Wiring
    family: Family
    weights: Weights
    tokenizer: PreTrainedTokenizerBase | None = None
    custom: CustomModules | None = None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        head: Head,
        tokenizer: PreTrainedTokenizerBase | None = None,
        custom: CustomModules | None = None,
        weights: Weights | None = None,
    ) -> "LoadedModel":
        """Describe a model that is already in memory; its mode (train or eval) stays as it is.

        Raises:
            ValueError: an unknown family, a head that the family lacks, or a module path that the model lacks.
        """
        shape = model_shape(model.config, head, custom)
        family = FAMILIES[shape.family] if custom is None else Family(custom.block, (), (head,), final_norm=custom.final_norm)
        loaded = cls(model, shape, read_wiring(model, family, shape), family, weights or Whole(model), tokenizer, custom)
        for layer in range(1, shape.layers + 1):
            loaded.block(layer)
        return loaded

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the weights and of the configuration that shapes the computation."""
        return weights_fingerprint(self.model, self.weights)

    @property
    def body(self) -> nn.Module:
        """Where paths of blocks start: the base model, or the whole model for ``custom``."""
        return self.model if self.custom is not None else self.model.base_model

    def block(self, layer: int) -> nn.Module:
        """Block ``layer``, counted from 1."""
        return submodule(self.body, self.family.block.format(i=layer - 1))

    @property
    def word_head(self) -> nn.Module | None:
        """The linear layer that yields word logits, or one that stands for it (narrow_head); None without."""
        if self.shape.head not in LM_HEADS:
            return None
        if self.custom is not None and self.custom.head is not None:
            return submodule(self.model, self.custom.head)
        head = self.model.get_output_embeddings()
        assert head is None or isinstance(head, nn.Module)
        rest = self.family.head_rest
        return head if head is None or rest is None else NarrowHead(head, submodule(self.model, rest), self.weights)


def load_model(
    spec: ModelSpec, *, attention: str | None = None, sharding: Sharding | None = None, device: torch.device | None = None
) -> LoadedModel:
    """Load ``spec`` from disk, in eval mode; never from the network.

    Args:
        attention: transformers' attention implementation; by default SDPA where the model has it (families.attention_implementation).
        sharding: How it is to lie over the ranks of the default process group, all of which load it; not at all by default.
        device: Where its weights go; the CPU by default.

    Raises:
        ValueError: no model folder, an encoder-decoder, an unknown family without ``modules``, or weights that the head needs are missing.
    """
    config = load_config(spec.model, spec.trust_remote_code)
    shape = model_shape(config, spec.head, spec.modules)
    if spec.labels is not None and spec.head not in ("classification", "token_classification"):
        raise ValueError(f"labels: the head {spec.head} has no number of labels to choose")
    if spec.labels is not None and spec.labels != shape.labels:
        if not spec.new_head:
            raise ValueError(f"{spec.model} has {shape.labels} labels, expected {spec.labels}; new_head: true starts a new head")
        config.num_labels = spec.labels
    further = quantisation(spec.quantisation, config, sharding, device)
    with quiet():
        try:
            arguments = {
                "pretrained_model_name_or_path": str(spec.model),
                "config": config,
                "dtype": getattr(torch, spec.dtype),
                "attn_implementation": attention or attention_implementation(config.model_type),
                "trust_remote_code": spec.trust_remote_code,
                "ignore_mismatched_sizes": spec.new_head,
                "local_files_only": True,
                "use_safetensors": True,
                **further,
            }
            load = loader("none" if sharding is None else sharding.kind)
            with talking(), without_padding_beyond(config):
                model, report, weights = load(HEADS[spec.head], arguments, sharding or Sharding(), device or torch.device("cpu"))
        except ShardingError:
            raise
        except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
            raise ValueError(f"{spec.model} cannot be loaded with the head {spec.head}: {_first_line(error)}") from error
    refuse_random_weights(spec, model, report)
    take_words(model, spec.model, config.pad_token_id)
    has_tokenizer = any((spec.model / name).exists() for name in _TOKENIZER_FILES)
    tokenizer = load_tokenizer(spec) if spec.tokenizer is not None or has_tokenizer else None
    if model.config.pad_token_id is None and spec.head == "classification":
        # transformers refuses batches without one; which token answers for a row is read from the mask all the same
        model.config.pad_token_id = 0 if tokenizer is None or tokenizer.pad_token_id is None else tokenizer.pad_token_id
    quantised = is_quantised(model)
    loaded = LoadedModel.of(model.eval(), spec.head, tokenizer, spec.modules, Quantised(model) if quantised else weights)
    if quantised:  # read before it runs: bitsandbytes' 4-bit weights on a CPU answer otherwise after both
        _ = loaded.fingerprint
    return loaded


def load_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model folder.

    Raises:
        ValueError: no such folder, no readable config.json, or an encoder-decoder.
    """
    if not folder.is_dir():
        raise ValueError(f"expected a Hugging Face model folder, found {'a file' if folder.exists() else 'nothing'} at {folder}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no Hugging Face model folder: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {_first_line(error)}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{folder} is an encoder-decoder ({config.model_type}); only encoders and decoders can be distilled")
    config.return_dict = True
    assert isinstance(config, PreTrainedConfig)
    return config


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of ``spec``.

    Raises:
        ValueError: the folder holds none.
    """
    folder = spec.tokenizer or spec.model
    if not folder.is_dir():
        raise ValueError(f"expected a folder with a tokenizer, found {'a file' if folder.exists() else 'nothing'} at {folder}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # the Rust library raises plain Exception
        raise ValueError(f"{folder} has no tokenizer that can be read: {_first_line(error)}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):  # what transformers makes of a folder without files
        raise ValueError(f"{folder} has no tokenizer that can be read: it has no vocabulary")
    return tokenizer


def model_shape(config: PreTrainedConfig, head: Head, custom: CustomModules | None = None) -> ModelShape:
    """The shape of a model from its configuration alone.

    Raises:
        ValueError: an unknown family, a head that the family lacks, or a variant whose attention is not understood.
    """
    labels = {"multiple_choice": 1, "classification": config.num_labels, "token_classification": config.num_labels}.get(head, 0)
    vocab = getattr(config, "vocab_size", 0)
    if custom is not None:
        return ModelShape(
            family="custom", head=head, layers=custom.layers, width=custom.width, heads=0, kv_heads=0, head_width=0, vocab=vocab,
            labels=labels, causal=head == "causal_lm", pre_norm=False, windows=(None,) * custom.layers, attends=False,
        )  # fmt: skip
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"unknown model family {config.model_type!r}{did_you_mean(config.model_type, sorted(FAMILIES))}; known are "
            f"{', '.join(sorted(FAMILIES))}; for others give the module paths (modules: block, layers, width)"
        )
    if head not in family.heads:
        raise ValueError(f"{config.model_type} has no head {head!r}; expected one of {', '.join(family.heads)}")
    if getattr(config, "is_decoder", False) and not family.causal:
        raise ValueError(f"{config.model_type} with is_decoder is not supported")
    bidirectional = bool(getattr(config, "use_bidirectional_attention", False)) or not getattr(config, "is_causal", True)
    if family.causal and bidirectional and not family.may_be_bidirectional:
        raise ValueError(f"{config.model_type} with bidirectional attention is not supported")
    heads, bottleneck = config.num_attention_heads, family.bottleneck(config)
    return ModelShape(
        family=config.model_type,
        head=head,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_width=getattr(config, "head_dim", None) or (bottleneck.width if bottleneck else config.hidden_size) // heads,
        vocab=vocab,
        labels=labels,
        causal=family.causal and not bidirectional,
        bottleneck=bottleneck.width if bottleneck else 0,
        embedding=family.embedding(config) if head == "masked_lm" else 0,
        pre_norm=family.norm is not None,
        windows=family.windows(config),
    )


def check_length(loaded: LoadedModel, tokens: int) -> None:
    """Refuse rows longer than the model's positions; ``tokens`` is the longest row.

    Raises:
        ValueError: the model takes fewer tokens.
    """
    config = loaded.model.config
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and loaded.family.positions_after_padding:
        limit -= config.pad_token_id + 1
    if limit is not None and tokens > limit:
        raise ValueError(f"{loaded.shape.family} takes rows of up to {limit} tokens, found {tokens}; build shorter rows")


def forward(loaded: LoadedModel, batch: Batch) -> ModelOutput:
    """Run the model on ``batch``: transformers' output, with logits [B, 1] where the head is multiple_choice.

    Positions count a document's own tokens, so they depend neither on the side nor on the length of padding. Packed
    documents see only themselves.

    Raises:
        ValueError: packed documents or kept padding for a head that answers for whole rows, for trigrams, or a custom architecture.
    """
    model, family, custom = loaded.model, loaded.family, loaded.custom is not None
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.mask.long()}
    accepted = inspect.signature(model.forward).parameters
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    takes_segments = "token_type_ids" in accepted if custom else family.segments
    if batch.segments is not None and takes_segments and getattr(model.config, "type_vocab_size", 2) > 1:
        inputs["token_type_ids"] = batch.segments
    if not custom and causality_suffices(batch, loaded.shape, loaded.wiring):  # a mask would take the square of the row's length
        inputs |= {"attention_mask": None, "position_ids": running_positions(batch, model.config)}
    elif not custom:
        positions_BT, pad = token_positions(batch), model.config.pad_token_id
        inputs["position_ids"] = torch.where(batch.text, positions_BT + pad + 1, pad) if family.positions_after_padding else positions_BT
    if batch.documents is not None:
        if custom or loaded.shape.head in ("classification", "multiple_choice"):
            raise ValueError(f"packed documents and kept padding need a head for tokens of a known family, found {loaded.shape.head}")
        kinds = model.config.layer_types if family.windows is typed_windows else None
        additive = model.dtype if model.config._attn_implementation == "eager" else None
        inputs["attention_mask"] = document_masks(batch, loaded.shape, kinds, additive)
    if loaded.shape.head == "multiple_choice":  # a row is one choice: [B, 1, T]; position ids are not unfolded by every family
        for name in inputs.keys() & {"input_ids", "attention_mask", "token_type_ids"}:
            inputs[name] = inputs[name].unsqueeze(1)
    mixes = not custom and family.trigrams(model.config)
    with empty_padding(model, batch) if mixes else nullcontext():
        output = model(**inputs)
    assert isinstance(output, ModelOutput)
    return output


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
