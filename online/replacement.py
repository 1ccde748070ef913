"""Run blocks of one model in the place of blocks of another, for one forward pass: a stack mixed from two models.

Source: Xu et al. 2020, BERT-of-Theseus, section 3.1 (module replacing).
Shapes: B rows, T padded tokens, W width.
"""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import Cache

from online.batch import Batch
from online.families import submodule
from online.masks import as_added, pair_mask, token_positions
from online.models import LoadedModel
from online.taps import Tap, computes_anew, first_argument, with_first
from online.tensor_parallel import Split

_STAND_INS: WeakKeyDictionary[nn.Module, tuple[nn.Module, ...]] = WeakKeyDictionary()


class Replaced:
    """During forward passes of ``loaded`` on ``batch`` under this context, blocks of ``other`` compute what some of its blocks would.

        with Replaced(student, teacher, {2: (3, 4)}, batch), Capture(student, keys) as capture:
            forward(student, batch)  # block 2 is the teacher's blocks 3 and 4, one after the other

    Each pass may have other blocks replaced, or none. A block of ``other`` gets the hidden state, masks and rotary embedding that its
    own kind of block has in ``other`` (window, frequencies). Gradients flow through it; that its weights get none is for the caller to
    say (``requires_grad_``), and so is whether it drops out (``train``, ``eval``). Nothing of ``other`` becomes part of ``loaded.model``.

    Capture reads from ``loaded``: ``hidden.i`` of a replaced block is what stood in for it gave out; its ``input.i``, ``query.i`` and
    so on are not computed and cannot be read or written. ``other``'s own sites can be written under Intervene(other, ...).

    All ranks have to replace the same blocks where ``other`` is sharded (ZeRO-3, FSDP2).

    Args:
        blocks: number of a block of ``loaded``: first and last of the blocks of ``other`` in its place, all counted from 1.

    Raises:
        ValueError: blocks that do not exist or do not fit: another family, width, direction, dtype or way to compute attention; a
            model split by tensor parallelism; gradient checkpointing, which computes blocks anew after the context has ended.
    """

    def __init__(self, loaded: LoadedModel, other: LoadedModel, blocks: Mapping[int, tuple[int, int]], batch: Batch) -> None:
        check_pair(loaded, other)
        for number, (first, last) in blocks.items():
            if not 1 <= number <= loaded.shape.layers:
                raise ValueError(f"block {number} cannot be replaced: the model has blocks 1 to {loaded.shape.layers}")
            if not 1 <= first <= last <= other.shape.layers:
                raise ValueError(
                    f"block {number} cannot be replaced by blocks {first} to {last} of a model with blocks 1 to {other.shape.layers}"
                )
        self._loaded, self._other, self._batch = loaded, other, batch
        self._blocks = dict(blocks)
        self._held: list[tuple[nn.Module, Any, tuple[nn.Module, ...] | None]] = []

    def __enter__(self) -> "Replaced":
        if self._blocks and computes_anew(self._loaded.model):
            raise ValueError("gradient checkpointing computes blocks anew without what replaces them; turn gradient_checkpointing off")
        for number, (first, last) in self._blocks.items():
            block, chain = self._loaded.block(number), range(first, last + 1)
            self._held.append((block, vars(block).get("forward"), _STAND_INS.get(block)))
            vars(block)["forward"] = self._forward(number, chain)
            _STAND_INS[block] = tuple(self._other.block(i) for i in chain)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._held:
            block, forward, stand_ins = self._held.pop()
            vars(block).pop("forward")
            _STAND_INS.pop(block)
            if forward is not None:
                vars(block)["forward"] = forward
            if stand_ins is not None:
                _STAND_INS[block] = stand_ins

    def _forward(self, number: int, chain: range) -> Callable[..., object]:
        return lambda *args, **kwargs: self._run(number, chain, args, kwargs)  # called as the block's own forward

    def _run(self, number: int, chain: range, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        other: LoadedModel = self._other
        output: object = None
        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            raise ValueError("a stack mixed from two models keeps no keys and values; run it with use_cache: false")
        for layer in chain:
            block, named = other.block(layer), {**kwargs, **self._own(number, layer, first_argument(args, kwargs), kwargs)}
            with other.weights.calling(block):
                output = block(*args, **named)
            args, kwargs = with_first(args, kwargs, Tap(block).read(output))
        return output

    def _own(self, number: int, layer: int, hidden_BTW: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments in which block ``layer`` of the other model differs from block ``number`` of this one."""
        other: LoadedModel = self._other
        own: dict[str, Any] = {}
        if "position_embeddings" in kwargs:
            own["position_embeddings"] = _rotary(other, layer, hidden_BTW, token_positions(self._batch))
        if other.shape.windows[layer - 1] != self._loaded.shape.windows[number - 1]:
            mask = pair_mask(self._batch, other.shape, layer)
            own["attention_mask"] = as_added(mask, hidden_BTW.dtype) if _attention(other) == "eager" else mask
        return own


def stand_ins(block: nn.Module) -> tuple[nn.Module, ...]:
    """The modules that run where ``block`` is called: itself, or those of another model under Replaced."""
    return _STAND_INS.get(block, (block,))


def check_pair(loaded: LoadedModel, other: LoadedModel) -> None:
    """Refuse to mix blocks of models that do not pass hidden states and masks of one kind.

    Raises:
        ValueError: what differs, and how it would have to be.
    """
    for model in (loaded, other):
        if not model.shape.attends:
            raise ValueError("blocks of a custom architecture cannot be replaced: what they are handed over is not known")
        if isinstance(model.weights, Split):
            raise ValueError("a model split by tensor parallelism cannot be mixed with another; shard it as zero3 or fsdp")
    for name, ours, theirs, mend in (
        ("family", loaded.shape.family, other.shape.family, "of one family"),
        ("width", loaded.shape.width, other.shape.width, "of one width"),
        ("causal", loaded.shape.causal, other.shape.causal, "that look in the same direction"),
        ("dtype", loaded.model.dtype, other.model.dtype, "loaded in one dtype"),
        ("attention", _attention(loaded), _attention(other), "loaded with the same attention"),
    ):
        if ours != theirs:
            raise ValueError(f"blocks cannot be replaced: expected models {mend}, found {name} {ours} and {theirs}")
    if _attention(loaded) not in ("eager", "sdpa"):
        raise ValueError(f"blocks cannot be replaced: expected models loaded with eager or sdpa attention, found {_attention(loaded)}")


def _attention(loaded: LoadedModel) -> str:
    return str(loaded.model.config._attn_implementation)


def _rotary(loaded: LoadedModel, layer: int, hidden_BTW: Tensor, positions_BT: Tensor) -> object:
    """Cosine and sine of block ``layer``, as the model makes them."""
    assert loaded.family.rotary is not None
    rotary = submodule(loaded.body, loaded.family.rotary)
    if hasattr(rotary, "inv_freq"):
        return rotary(hidden_BTW, positions_BT)
    return rotary(hidden_BTW, positions_BT, loaded.model.config.layer_types[layer - 1])
