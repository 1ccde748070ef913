"""What a model that lies in parts over ranks holds and gathers, from its shapes alone. docs/scale.md has the formulas."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from online.families import submodule
from online.models import LoadedModel
from online.sharding import Kind, Sharding

_DEALT = ("colwise", "rowwise", "embedding_rowwise")
"""Ways of transformers' plans to split a weight, or what their names begin with."""


@dataclass(frozen=True)
class Sizes:
    """The weights of a model and where they are, in bytes. Tensors without data will do."""

    loaded: LoadedModel

    @cached_property
    def itemsize(self) -> int:
        """Bytes of a weight, and of each number of a hidden state."""
        return self.loaded.model.dtype.itemsize

    @cached_property
    def elements(self) -> int:
        """Weights of the model; tied ones count once."""
        return sum(weight.numel() for weight in self.loaded.model.parameters())

    @cached_property
    def weights(self) -> int:
        """Bytes of them."""
        return _bytes(self.loaded.model.parameters())

    @cached_property
    def buffers(self) -> int:
        """Bytes that every rank holds beside them, such as rotary frequencies."""
        return _bytes(self.loaded.model.buffers())

    @cached_property
    def block(self) -> int:
        """Bytes of the weights of the largest block."""
        return max(_bytes(block.parameters()) for block in self._blocks)

    @cached_property
    def block_weight(self) -> int:
        """Bytes of the largest weight of a block."""
        return max(weight.nbytes for block in self._blocks for weight in block.parameters())

    @cached_property
    def outside(self) -> int:
        """Bytes of the weights that are in no block."""
        return self.weights - sum(_bytes(block.parameters()) for block in self._blocks)

    @cached_property
    def module(self) -> int:
        """Bytes of the weights that a module holds itself, at most, of several weights twice."""
        own = [list(module.parameters(recurse=False)) for module in self.loaded.model.modules()]
        return max(_bytes(weights) * min(2, len(weights)) for weights in own)

    @cached_property
    def embedding(self) -> int:
        """Bytes of the largest weight that is in no block: the word embedding or the head."""
        return max((weight.nbytes for weight in self._words), default=0)

    @cached_property
    def embeddings(self) -> int:
        """Bytes of the word embedding and the head."""
        return _bytes(self._words)

    @property
    def tied(self) -> bool:
        """Whether the word embedding is the head, or part of it."""
        head = self.loaded.word_head
        return head is not None and any(weight is self._words[0] for weight in head.parameters())

    @property
    def _blocks(self) -> list[nn.Module]:
        loaded = self.loaded
        return [loaded.block(layer) for layer in range(1, loaded.shape.layers + 1)]

    @property
    def _words(self) -> list[Tensor]:
        """The weights of word embedding and head, each once; biases left out."""
        modules = (self.loaded.model.get_input_embeddings(), self.loaded.word_head)
        weights = (weight for module in modules if module is not None for weight in module.parameters() if weight.dim() == 2)
        return list({id(weight): weight for weight in weights}.values())

    @cached_property
    def split(self) -> int:
        """Bytes of the weights that tensor parallelism deals out; each rank has the others as a whole. 0 where it cannot."""
        loaded, split = self.loaded, self.loaded.family.split
        if split is None:
            plan = getattr(loaded.model, "_tp_plan", None) or {}
            paths = "|".join(re.escape(name).replace(r"\*", r"\d+") for name, way in plan.items() if way.startswith(_DEALT))
            modules = [module for name, module in loaded.model.named_modules() if paths and re.fullmatch(paths, name)]
        else:
            modules = [submodule(block, path) for block in self._blocks for part in split for path in part]
        weights = [weight for weight in (getattr(module, "weight", None) for module in modules) if isinstance(weight, Tensor)]
        return _bytes({id(weight): weight for weight in (*weights, *(self._words if weights else ()))}.values())


def _bytes(weights: Iterable[Tensor]) -> int:
    return sum(weight.nbytes for weight in weights)


def _ahead(model: Sizes, tokens: int) -> float:
    """ZeRO-3: the module that runs, and what is fetched ahead: half a block (online.zero3's limit) and one weight more.

    Weights that come in one message are there twice while they are laid out.
    """
    return model.module + 2 * (model.block / 2 + model.block_weight)


def _units(model: Sizes, tokens: int) -> float:
    """FSDP2: the block that runs, the next unit, twice while it is laid out, and what stays: tied embeddings and the outermost unit."""
    outermost = model.outside - model.embeddings
    return model.block + 2 * max(model.block, model.embedding) + (model.embedding if model.tied else 0) + 2 * outermost


def _sums(model: Sizes, tokens: int) -> float:
    """Tensor parallelism: no weights, but a copy of hidden states while they are summed."""
    return tokens * model.loaded.shape.width * model.itemsize


def _nothing(model: Sizes, tokens: int) -> float:
    return 0.0


GATHERED: dict[Kind, Callable[[Sizes, int], float]] = {"none": _nothing, "zero3": _ahead, "fsdp": _units, "tp": _sums}
"""Bytes of other ranks that a rank holds at worst while it answers a batch of so many padded tokens."""


def held(model: Sizes, sharding: Sharding) -> float:
    """Bytes of the weights that are a rank's own."""
    if sharding.kind == "tp":
        return model.weights - model.split + model.split / sharding.size
    return model.weights / sharding.size


def splits(model: Sizes, ranks: int) -> bool:
    """Whether tensor parallelism can deal the model out to so many ranks."""
    from online.tensor_parallel import check_heads

    try:
        check_heads(model.loaded.model.config, ranks)
    except ValueError:
        return False
    return model.split > 0
