"""Where transformers keeps what in each model family: one table entry per ``config.model_type``.

Paths of blocks and norms start at the base model (``model.base_model``), paths inside a block at the block, paths of
heads at the whole model. Modules are counted from 0 in paths; blocks are counted from 1 everywhere else.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from online.bottleneck import Bottleneck, mobilebert_bottleneck
from store.shape import Head, ModelShape, Wiring

ENCODER_HEADS: tuple[Head, ...] = ("base", "masked_lm", "classification", "token_classification", "multiple_choice")
DECODER_HEADS: tuple[Head, ...] = ("base", "causal_lm", "classification", "token_classification")


def no_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """Every block attends without limit."""
    return (None,) * config.num_hidden_layers


def one_window(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """``sliding_window`` holds for every block."""
    return (config.sliding_window,) * config.num_hidden_layers


def typed_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """``sliding_window`` holds for the blocks that ``layer_types`` names; transformers then takes one mask per type."""
    window = config.sliding_window
    if window is not None and getattr(config, "use_bidirectional_attention", False):
        window -= 1  # this variant of Gemma 3 excludes the bound that other bidirectional windows include
    return tuple(window if kind == "sliding_attention" else None for kind in config.layer_types)


@dataclass(frozen=True)
class Family:
    """How to read sites and weights of one architecture."""

    block: str
    """Path of block i, with ``{i}`` counted from 0."""
    projections: tuple[str, ...]
    """Query, key and value projections in a block, or the one module that fuses them in this order."""
    heads: tuple[Head, ...]
    attention_output: str = ""
    """Dense layer in a block that puts what the heads found back into the hidden state."""
    causal: bool = False
    norm: str | None = None
    """Norm in front of the projections (pre-norm models)."""
    norm_kind: Literal["layer", "rms", "rms_one"] | None = None
    """As store.shape.Wiring.norm."""
    head_norms: tuple[str, str] | None = None
    """Norms of each query head and of each key head."""
    final_norm: str | None = None
    rotary: str | None = None
    """Module that holds the inverse frequencies; without one, positions are learned embeddings."""
    transform: tuple[str, str] | None = None
    """Dense layer and layer norm of the masked-LM head."""
    activation: Callable[[PreTrainedConfig], str] | None = None
    """Activation between them."""
    windows: Callable[[PreTrainedConfig], tuple[int | None, ...]] = no_windows
    segments: bool = False
    """Whether the model has token-type embeddings."""
    trigrams: Callable[[PreTrainedConfig], bool] = lambda config: False
    """Whether the embedding of a token is made of its neighbours' too."""
    bottleneck: Callable[[PreTrainedConfig], Bottleneck | None] = lambda config: None
    """What stands in front of the projections (post-norm models)."""
    embedding: Callable[[PreTrainedConfig], int] = lambda config: 0
    """Width of word embeddings, where the transform of the word head narrows hidden states to it."""
    head_rest: str | None = None
    """Linear layer that holds what a narrow word embedding lacks of the language-model head, [width - embedding, vocab]."""
    computed: tuple[str, ...] = ()
    """Entries of a configuration that transformers computes from others and, once there, does not compute anew."""
    positions_after_padding: bool = False
    """Learned positions start at pad_token_id + 1 (RoBERTa)."""
    score_cap: str | None = None
    """Attribute of the configuration that caps attention scores."""
    logit_cap: str | None = None
    """Attribute of the configuration that caps word logits."""
    may_be_bidirectional: bool = False
    """Whether ``use_bidirectional_attention`` is understood."""
    split: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    """Linear layers of a block whose outputs, and those whose inputs tensor parallelism splits; by transformers' own plan without."""


_BERT_PROJECTIONS = ("attention.self.query", "attention.self.key", "attention.self.value")
_LLAMA_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

_BERT_SPLIT = ((*_BERT_PROJECTIONS, "intermediate.dense"), ("attention.output.dense", "output.dense"))

_BERT = Family(
    block="encoder.layer.{i}",
    projections=_BERT_PROJECTIONS,
    heads=ENCODER_HEADS,
    attention_output="attention.output.dense",
    transform=("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
    activation=lambda config: config.hidden_act,
    segments=True,
    split=_BERT_SPLIT,
)

_ROBERTA = replace(
    _BERT,
    transform=("lm_head.dense", "lm_head.layer_norm"),
    activation=lambda config: "gelu",
    positions_after_padding=True,
)

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "electra": replace(
        _BERT,
        transform=("generator_predictions.dense", "generator_predictions.LayerNorm"),
        activation=lambda config: "gelu",
        embedding=lambda config: config.embedding_size,
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": Family(
        block="transformer.layer.{i}",
        projections=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        heads=ENCODER_HEADS,
        attention_output="attention.out_lin",
        transform=("vocab_transform", "vocab_layer_norm"),
        activation=lambda config: config.activation,
        split=(("attention.q_lin", "attention.k_lin", "attention.v_lin", "ffn.lin1"), ("attention.out_lin", "ffn.lin2")),
    ),
    "modernbert": Family(
        block="layers.{i}",
        projections=("attn.Wqkv",),
        heads=ENCODER_HEADS,
        attention_output="attn.Wo",
        norm="attn_norm",  # an identity in the first block
        norm_kind="layer",
        final_norm="final_norm",
        rotary="rotary_emb",
        transform=("head.dense", "head.norm"),
        activation=lambda config: config.classifier_activation,
        windows=typed_windows,
    ),
    "mobilebert": Family(
        block="encoder.layer.{i}",
        projections=_BERT_PROJECTIONS,
        heads=ENCODER_HEADS,
        attention_output="attention.output.dense",
        transform=("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
        activation=lambda config: config.hidden_act,
        segments=True,
        trigrams=lambda config: config.trigram_input,
        bottleneck=mobilebert_bottleneck,
        head_rest="cls.predictions.dense",
        computed=("true_hidden_size",),
    ),
    "gpt2": Family(
        block="h.{i}",
        projections=("attn.c_attn",),
        heads=DECODER_HEADS,
        attention_output="attn.c_proj",
        causal=True,
        norm="ln_1",
        norm_kind="layer",
        final_norm="ln_f",
    ),
    "llama": Family(
        block="layers.{i}",
        projections=_LLAMA_PROJECTIONS,
        heads=DECODER_HEADS,
        attention_output="self_attn.o_proj",
        causal=True,
        norm="input_layernorm",
        norm_kind="rms",
        final_norm="norm",
        rotary="rotary_emb",
    ),
    "mistral": Family(
        block="layers.{i}",
        projections=_LLAMA_PROJECTIONS,
        heads=DECODER_HEADS,
        attention_output="self_attn.o_proj",
        causal=True,
        norm="input_layernorm",
        norm_kind="rms",
        final_norm="norm",
        rotary="rotary_emb",
        windows=one_window,
    ),
    "qwen2": Family(
        block="layers.{i}",
        projections=_LLAMA_PROJECTIONS,
        heads=DECODER_HEADS,
        attention_output="self_attn.o_proj",
        causal=True,
        norm="input_layernorm",
        norm_kind="rms",
        final_norm="norm",
        rotary="rotary_emb",
        windows=typed_windows,
    ),
    "qwen3": Family(
        block="layers.{i}",
        projections=_LLAMA_PROJECTIONS,
        heads=DECODER_HEADS,
        attention_output="self_attn.o_proj",
        causal=True,
        norm="input_layernorm",
        norm_kind="rms",
        head_norms=_LLAMA_HEAD_NORMS,
        final_norm="norm",
        rotary="rotary_emb",
        windows=typed_windows,
    ),
    "gemma": Family(
        block="layers.{i}",
        projections=_LLAMA_PROJECTIONS,
        heads=DECODER_HEADS,
        attention_output="self_attn.o_proj",
        causal=True,
        norm="input_layernorm",
        norm_kind="rms_one",
        final_norm="norm",
        rotary="rotary_emb",
    ),
    "gemma2": Family(
        block="layers.{i}",
        projections=_LLAMA_PROJECTIONS,
        heads=DECODER_HEADS,
        attention_output="self_attn.o_proj",
        causal=True,
        norm="input_layernorm",
        norm_kind="rms_one",
        final_norm="norm",
        rotary="rotary_emb",
        windows=typed_windows,
        score_cap="attn_logit_softcapping",
        logit_cap="final_logit_softcapping",
    ),
    "gemma3_text": Family(
        block="layers.{i}",
        projections=_LLAMA_PROJECTIONS,
        heads=("base", "causal_lm", "classification"),
        attention_output="self_attn.o_proj",
        causal=True,
        norm="input_layernorm",
        norm_kind="rms_one",
        head_norms=_LLAMA_HEAD_NORMS,
        final_norm="norm",
        rotary="rotary_emb",
        windows=typed_windows,
        logit_cap="final_logit_softcapping",
        may_be_bidirectional=True,
    ),
}


def attention_implementation(model_type: str) -> str | None:
    """How transformers is to run attention: SDPA, but eager under a soft cap, which SDPA lacks; its own choice for unknown models."""
    family = FAMILIES.get(model_type)
    if family is None:
        return None
    return "eager" if family.score_cap else "sdpa"


def submodule(root: nn.Module, path: str) -> nn.Module:
    """The module at ``path`` below ``root``.

    Raises:
        ValueError: there is none.
    """
    try:
        return root.get_submodule(path)
    except AttributeError:
        known = ", ".join(name for name, _ in root.named_children())
        raise ValueError(f"{type(root).__name__} has no module {path!r}; it holds {known}") from None


def read_wiring(model: PreTrainedModel, family: Family, shape: ModelShape) -> Wiring:
    """The numbers beside the weights, from the modules as they run.

    Raises:
        ValueError: a module that the family should have is absent, or rotary embeddings scale differently by kind of block.
    """
    if not shape.attends:
        return Wiring()
    config, body = model.config, model.base_model
    blocks = [submodule(body, family.block.format(i=i)) for i in range(shape.layers)]
    attention = [submodule(block, family.projections[0].rpartition(".")[0]) for block in blocks]
    rotary = None if family.rotary is None else submodule(body, family.rotary)
    transform = family.transform if shape.head == "masked_lm" else None
    bottleneck = family.bottleneck(config)
    behind = None if bottleneck is None else submodule(blocks[0], f"{bottleneck.path}.LayerNorm")
    scales = behind is not None and not isinstance(behind, nn.LayerNorm)  # transformers' NoNorm, which has no epsilon
    return Wiring(
        norm=family.norm_kind,
        norm_eps=0.0 if family.final_norm is None else _epsilon(submodule(body, family.final_norm)),
        bottleneck_norm=None if behind is None else "affine" if scales else "layer",
        bottleneck_norm_eps=0.0 if behind is None or scales else _epsilon(behind),
        bottleneck_values=bottleneck is not None and bottleneck.values,
        first_norm=family.norm is None or not isinstance(submodule(blocks[0], family.norm), nn.Identity),
        attention_scale=tuple(float(getattr(module, "scaling", shape.head_width**-0.5)) for module in attention),
        score_cap=getattr(config, family.score_cap) if family.score_cap else None,
        head_norm=("rms_one" if family.norm_kind == "rms_one" else "rms") if family.head_norms else None,
        rotary=rotary is not None,
        rotary_scaling=1.0 if rotary is None else _rotary_scaling(rotary),
        rotary_by_length=rotary is not None and not _rotary_kinds(rotary).isdisjoint(("dynamic", "longrope")),
        head_activation=family.activation(config) if transform and family.activation else None,
        head_norm_eps=_epsilon(submodule(model, transform[1])) if transform else 0.0,
        logit_cap=getattr(config, family.logit_cap) if family.logit_cap else None,
    )


def _epsilon(norm: nn.Module) -> float:
    epsilon = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    assert isinstance(epsilon, float)
    return epsilon


def _rotary_kinds(rotary: nn.Module) -> set[str]:
    kinds = rotary.rope_type
    return set(kinds.values()) if isinstance(kinds, dict) else {str(kinds)}


def _rotary_scaling(rotary: nn.Module) -> float:
    scalings = {float(value) for name, value in vars(rotary).items() if name.endswith("attention_scaling")}
    if len(scalings) != 1:
        raise ValueError(f"expected one scaling of rotary embeddings for all blocks, found {sorted(scalings)}")
    return scalings.pop()
