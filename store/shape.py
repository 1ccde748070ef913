"""What the shape of a model is, without its weights: all that a method needs to know of a teacher it never sees."""

from typing import Annotated, Literal

from pydantic import Field

from store.features import FeatureKey
from store.strict import Strict

Head = Literal["base", "masked_lm", "causal_lm", "classification", "token_classification", "multiple_choice"]


Size = Annotated[int, Field(ge=0, le=1 << 24)]


class ModelShape(Strict):
    """Sizes of a transformer. Widths are of the concatenated heads where not said otherwise."""

    family: str
    """Key of online.families.FAMILIES, or ``custom`` for module paths given in the recipe."""
    head: Head
    layers: int = Field(ge=1, le=10_000)
    width: Size
    heads: Size
    """Query heads."""
    kv_heads: Size
    head_width: Size
    """Width of one head; heads * head_width may differ from width."""
    vocab: Size
    labels: Size = 0
    """Outputs of the task head; 0 without one."""
    causal: bool
    bottleneck: Size = 0
    """Width of what enters the query and key projections where that is neither a hidden state nor its norm (MobileBERT); 0 elsewhere."""
    embedding: Size = 0
    """Width of word embeddings where a word head reads that many numbers (ELECTRA), and not a hidden state's; 0 elsewhere."""
    pre_norm: bool
    windows: tuple[int | None, ...]
    """Per block: how many tokens attention looks back (causal) or to each side (bidirectional, half the width); None is unlimited."""
    attends: bool = True
    """Whether query, key, value and attention can be read (False for ``custom``)."""

    def width_of(self, site: str) -> int:
        """Stored width of ``site`` for one token (for one row: task_logits of a row head); attention has none."""
        widths = {
            "hidden": self.width,
            "final": self.width,
            "input": self.bottleneck or self.width,
            "query": self.heads * self.head_width,
            "key": self.kv_heads * self.head_width,
            "value": self.kv_heads * self.head_width,
            "head_input": self.embedding or self.width,
            "lm_logits": self.vocab,
            "task_logits": self.labels,
        }
        return widths[site]

    def unit_width(self, key: FeatureKey) -> int:
        """Stored width of one unit of ``key``; for the forms of word predictions that of the logits they are made of."""
        return (key.kept or self.width_of(key.site)) * (key.leftmost or 1)


class Wiring(Strict):
    """The numbers beside the weights that turn one feature into another; online.derive reads them."""

    norm: Literal["layer", "rms", "rms_one"] | None = None
    """Norm of pre-norm blocks and the final norm; ``rms_one`` multiplies by 1 + weight (Gemma)."""
    norm_eps: float = 0.0
    first_norm: bool = True
    """Whether the first pre-norm block has a norm in front of its projections (ModernBERT's has none)."""
    bottleneck_norm: Literal["layer", "affine"] | None = None
    """Norm behind the linear layer of a bottleneck; ``affine`` has no statistics (MobileBERT's NoNorm). None without a bottleneck."""
    bottleneck_norm_eps: float = 0.0
    bottleneck_values: bool = False
    """Whether the value projection reads the bottleneck too, and not the hidden state in front of it."""
    attention_scale: tuple[float, ...] = ()
    """Per block, multiplies query * key."""
    score_cap: float | None = None
    """Attention scores are cap * tanh(score / cap) (Gemma 2)."""
    head_norm: Literal["rms", "rms_one"] | None = None
    """Norm over each query and key head before rotary (Qwen3, Gemma 3)."""
    rotary: bool = False
    rotary_scaling: float = 1.0
    """Multiplies cosine and sine (YaRN)."""
    rotary_by_length: bool = False
    """Whether frequencies change with the length of the input (dynamic, LongRoPE): attention then cannot be derived."""
    head_activation: str | None = None
    """Activation of the masked-LM head's transform (dense, activation, layer norm); None where there is no transform."""
    head_norm_eps: float = 0.0
    """Epsilon of the layer norm in that transform."""
    logit_cap: float | None = None
    """Word logits are cap * tanh(logit / cap) (Gemma 2)."""


STATICS: dict[str, str] = {
    "{i}.{query,key,value}.{weight,bias}": "projections of block i, [out, in] and [out]",
    "{i}.norm.{weight,bias}": "norm in front of them (pre-norm models)",
    "{i}.bottleneck.{weight,bias}, {i}.bottleneck_norm.{weight,bias}": "bottleneck in front of them, [bottleneck, width], and its norm",
    "{i}.{query,key}_norm.weight": "norm over each head",
    "{i}.rotary": "inverse frequencies of block i, [head_width / 2]",
    "final_norm.{weight,bias}": "norm after the last block",
    "transform.{weight,bias}, transform_norm.{weight,bias}": "transform of a masked-LM head",
    "head.{weight,bias}": "the language-model head, [vocab, head_input] and [vocab]",
}
"""Names of the weights that ship with a pass; a name is present exactly where the model has the weight."""
