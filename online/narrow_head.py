"""The language-model head of a model whose word embedding is narrower than its hidden states (MobileBERT).

Shapes: V words, W width of a hidden state, E of a word embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from online.sharding import Weights


class NarrowHead(nn.Module):
    """Word logits from E columns that are the word embedding and W - E that a second matrix holds.

    transformers multiplies both at once and calls neither layer, so this module, which shares their weights, stands for the head:
    to be called by itself, and to be asked for its weight.
    """

    def __init__(self, words: nn.Module, rest: nn.Module, weights: Weights) -> None:
        """``words.weight`` is [V, E], ``rest.weight`` [W - E, V]; ``weights`` gathers them where they are sharded."""
        super().__init__()
        assert isinstance(words, nn.Linear)
        assert isinstance(rest, nn.Linear)
        self.words, self.rest, self._weights = words, rest, weights

    @property
    def weight(self) -> Tensor:
        """[V, W], made anew; gradients reach both parts."""
        return torch.cat([self._weights.whole(self.words.weight), self._weights.whole(self.rest.weight).T], dim=1)

    @property
    def bias(self) -> Tensor:
        """[V]."""
        return self._weights.whole(self.words.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
