"""What stands between a hidden state and the projections of a block: the bottleneck of MobileBERT and of its teacher IB-BERT.

Both are one class of transformers, MobileBertModel, whose configuration says what each projection reads:

| ``use_bottleneck`` | ``use_bottleneck_attention`` | ``key_query_shared_bottleneck`` | query and key read   | value reads        |
|--------------------|------------------------------|---------------------------------|----------------------|--------------------|
| true               | true                         | either                          | ``bottleneck.input`` | the same           |
| true               | false                        | true (MobileBERT)               | ``bottleneck.attention`` | hidden state   |
| true               | false                        | false                           | hidden state         | the same           |
| false              | either                       | either                          | hidden state         | the same           |

A bottleneck is a linear layer from ``hidden_size`` to ``intra_bottleneck_size`` and a norm behind it.

Source: Sun et al. 2020, MobileBERT, section 3 and table 1 (arXiv 2004.02984). Its teacher, IB-BERT_LARGE, is the third row: the
projections read the hidden state of 512 and give 1,024. transformers gives them weights for inputs of ``intra_bottleneck_size``, so
that this row runs only where both widths are equal; elsewhere it is refused here, before the first batch fails. The nearest that
runs is the second row, the student's own: values as in the paper, queries and keys behind one more linear layer and norm, and 332
million weights in place of 293. Also unlike the published code: ``gelu`` is exact and not the tanh approximation (that is
``gelu_new``), what a mask hides is left out and not scored -6, and the norms of the embedding and of the last feed-forward layer
have an epsilon of 1e-5 (``layer_norm_eps`` elsewhere).
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Bottleneck:
    """The module that a block's query and key projections read from."""

    path: str
    """In a block; it holds ``dense`` and ``LayerNorm``."""
    width: int
    """Of what it gives."""
    values: bool
    """Whether the value projection reads it too, and not the hidden state."""


def mobilebert_bottleneck(config: PreTrainedConfig) -> Bottleneck | None:
    """Of a MobileBertConfig; None where projections read the hidden state.

    Raises:
        ValueError: sizes that MobileBertModel is built with, but cannot run.
    """
    width = config.intra_bottleneck_size if config.use_bottleneck else config.hidden_size
    if width % config.num_attention_heads:
        name = "intra_bottleneck_size" if config.use_bottleneck else "hidden_size"
        raise ValueError(f"{name} {width} is no multiple of num_attention_heads {config.num_attention_heads}")
    if not config.use_bottleneck:
        return None
    if config.use_bottleneck_attention:
        return Bottleneck("bottleneck.input", width, values=True)
    if config.key_query_shared_bottleneck:
        return Bottleneck("bottleneck.attention", width, values=False)
    if width != config.hidden_size:
        raise ValueError(
            f"transformers cannot run a mobilebert whose projections read hidden states of {config.hidden_size} with weights for an "
            f"intra_bottleneck_size of {width}; expected key_query_shared_bottleneck: true or use_bottleneck_attention: true"
        )
    return None
