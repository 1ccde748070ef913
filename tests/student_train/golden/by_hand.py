"""A small BERT for one row, written out in float64: embeddings, blocks and masked-LM head, with hidden states written over its own.

Shapes: T tokens without padding, W width, V words.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
"""Names of BertForMaskedLM -> float64."""
Writes = Mapping[int, Mapping[int, Tensor]]
"""Block -> token of the row -> what its output becomes there, [W]."""


def weights_of(model: torch.nn.Module) -> Weights:
    return {name: weight.detach().double() for name, weight in model.state_dict().items()}


def bert(weights: Weights, heads: int, layers: int, ids: Sequence[int], writes: Writes) -> tuple[list[Tensor], Tensor]:
    """Hidden states [T, W] of the embeddings and of each block, as they go on, and logits [T, V]."""
    table = "bert.embeddings."
    x = torch.stack(
        [
            weights[f"{table}word_embeddings.weight"][word]
            + weights[f"{table}position_embeddings.weight"][place]
            + weights[f"{table}token_type_embeddings.weight"][0]
            for place, word in enumerate(ids)
        ]
    )
    x = normed(weights, f"{table}LayerNorm", x)
    hidden = [x]
    for block in range(layers):
        name = f"bert.encoder.layer.{block}."
        query, key, value = (linear(weights, f"{name}attention.self.{part}", x) for part in ("query", "key", "value"))
        width = x.shape[1] // heads
        tokens = []
        for one in range(len(ids)):
            parts = []
            for head in range(heads):
                of = slice(head * width, (head + 1) * width)
                scores = torch.stack([(query[one, of] * key[other, of]).sum() / math.sqrt(width) for other in range(len(ids))])
                shares = scores.exp() / scores.exp().sum()
                parts.append(sum((shares[other] * value[other, of] for other in range(len(ids))), torch.zeros(())))
            tokens.append(torch.cat(parts))
        attended = linear(weights, f"{name}attention.output.dense", torch.stack(tokens))
        between = normed(weights, f"{name}attention.output.LayerNorm", attended + x)
        inner = linear(weights, f"{name}intermediate.dense", between)
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        x = normed(weights, f"{name}output.LayerNorm", linear(weights, f"{name}output.dense", inner) + between)
        written = writes.get(block + 1, {})
        x = torch.stack([written.get(place, x[place]) for place in range(len(ids))])
        hidden.append(x)
    y = linear(weights, "cls.predictions.transform.dense", x)
    y = normed(weights, "cls.predictions.transform.LayerNorm", y * (1 + torch.erf(y / math.sqrt(2))) / 2)
    return hidden, y @ weights["bert.embeddings.word_embeddings.weight"].T + weights["cls.predictions.bias"]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def normed(weights: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]
