"""Read features out of a model while it runs.

Shapes: B rows, T padded tokens, M chosen ones, W width of a feature, V words, C outputs of the task head.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from online.batch import Batch, Features, Value, take, words_at
from online.derive import attention_probs, attention_scores
from online.models import LM_HEADS, LoadedModel
from online.narrow_head import NarrowHead
from online.replacement import stand_ins
from online.statics import live_statics
from online.taps import PROJECTIONS, Site, before_words, first_argument, tap
from online.words import Share
from store.features import FeatureKey

ATTENTION = ("attention_scores", "attention_probs")
ROW_HEADS = ("classification", "multiple_choice")


class Capture:
    """During one forward pass under this context, the features ``keys``.

        with Capture(loaded, keys) as capture:
            forward(loaded, batch)
        features = capture.features(batch)

    Where a module runs more than once, its first value is kept. A language-model head is fed no tokens while the
    model runs: word logits are computed afterwards, for the tokens of the key alone, and are Words: made when they are asked for.

    Args:
        keys: without forms.
        grad: losses on these features are to reach the model's weights; a tensor that cannot is then an error.

    Raises:
        ValueError: the model has no such feature; the message says what it has.
    """

    def __init__(self, loaded: LoadedModel, keys: Iterable[FeatureKey], grad: bool = False) -> None:
        self._loaded = loaded
        self._keys = frozenset(keys)
        self._grad = grad
        self._head = _Head(loaded)
        self._values: dict[Site, Tensor] = {}
        self._cut: set[Site] = set()
        self._handles: list[RemovableHandle] = []
        for key in self._keys:
            check_key(loaded, key)

    def __enter__(self) -> "Capture":
        self._values.clear()
        self._cut.clear()
        try:
            for site in sorted({site for key in self._keys for site in _sources(key)}):
                self._hook(site)
            if self._loaded.word_head is not None:
                head = before_words(self._loaded)
                feed = (
                    head.module.register_forward_pre_hook(self._head.feed) if head.takes_in else head.module.register_forward_hook(_nothing)
                )
                self._handles.append(feed)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._remove()
        if error is not None:
            self._values.clear()

    def features(self, batch: Batch) -> Features:
        """The features of the pass that has just run on ``batch``, float32; of word logits the head runs under the autocast of now.

        Raises:
            ValueError: no pass has run, or a tensor was computed without gradient where one is needed (re-entrant
                gradient checkpointing, frozen or no-grad blocks below trainable ones).
        """
        return {key: self._feature(key, batch) for key in sorted(self._keys)}

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, site: Site) -> None:
        """Keep the first tensor that the module of ``site`` takes in or gives out."""
        place, width = tap(self._loaded, site), self._loaded.shape.width_of(site[0])

        def keep(tensor: Tensor) -> None:
            if site not in self._values:
                self._values[site] = self._loaded.weights.joined(tensor, width) if site[0] in PROJECTIONS else tensor
                if self._grad and not tensor.requires_grad and _has_trainable(self._loaded, *site):
                    self._cut.add(site)

        def before(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            keep(first_argument(args, kwargs))

        def after(module: nn.Module, args: object, output: object) -> None:
            keep(place.read(output))

        if place.takes_in:
            self._handles.append(place.module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            self._handles.append(place.module.register_forward_hook(after))

    def _value(self, site: str, layer: int = 0) -> Tensor:
        if (site, layer) not in self._values:
            raise ValueError(
                f"{site}{f'.{layer}' if layer else ''} was not seen: run one forward pass under Capture first; of a block that another "
                "model's stand in for there is hidden alone"
            )
        if (site, layer) in self._cut:
            raise ValueError(
                f"{site}{f'.{layer}' if layer else ''} carries no gradient although weights below it train; re-entrant gradient "
                "checkpointing does this: set use_reentrant to false"
            )
        return self._values[site, layer]

    def _feature(self, key: FeatureKey, batch: Batch) -> Value:
        loaded, layer = self._loaded, key.layer or 0
        if key.site in ATTENTION:
            query_BTQ, key_BTK = self._value("query", layer), self._value("key", layer)
            statics = live_statics(loaded, (f"{layer}.query_norm.weight", f"{layer}.key_norm.weight", f"{layer}.rotary"))
            scores_BHTT = attention_scores(query_BTQ, key_BTK, statics, layer, batch, loaded.shape, loaded.wiring)
            return scores_BHTT if key.site == "attention_scores" else attention_probs(scores_BHTT)
        if key.site == "lm_logits":
            return self._word_logits(key, batch)
        value = self._value(key.site, layer)
        if key.site == "task_logits" and loaded.shape.head in ROW_HEADS:
            return (value if value.dim() == 2 else take(value, batch, "last")).float()
        return _taken(value, batch, key.positions)

    def _word_logits(self, key: FeatureKey, batch: Batch) -> Value:
        """The head on the tokens of ``key`` alone; made now where it cannot be called as often as a rank likes."""
        input_BTW = self._value("head_input")
        head = self._head.now(input_BTW.device.type, self._grad)
        if key.positions == "mean":
            return take(self._head.whole(input_BTW), batch, "mean")
        input_ = input_BTW if key.positions == "all" else take(input_BTW, batch, key.positions)
        words = words_at(key, input_, batch, head or self._head.whole, self._loaded.shape.vocab)
        return replace(words, share=self._head.share(input_.device.type)) if head else words.dense()


class _Head:
    """The language-model head of a model: fed nothing while that runs, and asked for the logits of chosen tokens."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._asked = False

    def feed(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """As a hook in front of it."""
        return args if self._asked else (args[0][:, :0], *args[1:])

    def whole(self, input_: Tensor) -> Tensor:
        """Logits [..., V] of ``input_`` [..., W], float32."""
        return self._capped(self._loaded.weights.joined(self._called(input_), self._loaded.shape.vocab))

    def _called(self, input_: Tensor) -> Tensor:
        """What the head gives on this rank."""
        head = self._loaded.word_head
        assert head is not None
        self._asked = True
        try:
            with self._loaded.weights.calling(head):
                logits: Tensor = head(input_)
        finally:
            self._asked = False
        return logits

    def share(self, device: str) -> Share | None:
        """This rank's part of a head that is split over the ranks, with autocast and gradient as they are now; None of any other."""
        assert self._loaded.word_head is not None
        columns = self._loaded.weights.columns(self._loaded.word_head)
        if columns is None:
            return None
        part = partial(_under, device, *_modes(device), lambda input_MW: self._capped(self._called(input_MW)))
        return Share(part, columns.first, self._loaded.shape.vocab, columns.gathered)

    def now(self, device: str, grad: bool) -> Callable[[Tensor], Tensor] | None:
        """What may be called as often as a rank likes, with autocast and gradient as they are now; None where that cannot be.

        Ranks that gather the head together while each has tokens of its own would call it a different number of times: they
        gather its weight once, without gradient.
        """
        loaded = self._loaded
        modes = _modes(device)
        if not loaded.weights.together:
            return partial(_under, device, *modes, self.whole)
        if grad or not isinstance(loaded.word_head, nn.Linear | NarrowHead) or any(w.requires_grad for w in loaded.word_head.parameters()):
            return None  # a student's engine gathers weights itself, also where it is measured
        statics = live_statics(loaded, ("head.weight", "head.bias"))
        product = partial(F.linear, weight=statics["head.weight"], bias=statics.get("head.bias"))
        return partial(_under, device, *modes, lambda input_MW: self._capped(product(input_MW)))

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self._loaded.wiring.logit_cap
        return (logits if cap is None else torch.tanh(logits / cap) * cap).float()


def _modes(device: str) -> tuple[torch.dtype | None, bool]:
    """The type of autocast, if it is on, and whether gradients are wanted."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None, torch.is_grad_enabled()


def _under(device: str, dtype: torch.dtype | None, grad: bool, head: Callable[[Tensor], Tensor], input_MW: Tensor) -> Tensor:
    with torch.autocast(device, dtype, enabled=dtype is not None), torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        return head(input_MW)


def check_key(loaded: LoadedModel, key: FeatureKey) -> None:
    """Refuse a feature that ``loaded`` cannot answer for.

    Raises:
        ValueError: a block out of range, a site that this family or head lacks, or positions that the site lacks.
    """
    shape = loaded.shape
    if key.form:
        raise ValueError(f"{key}: a model answers with values; the form {key.form} is made from them")
    if key.layer is not None and not (0 if key.site == "hidden" else 1) <= key.layer <= shape.layers:
        raise ValueError(f"{key}: the model has blocks 1 to {shape.layers}")
    if key.site in ("input", *PROJECTIONS, *ATTENTION) and not shape.attends:
        raise ValueError(f"{key}: a custom architecture serves hidden, final and logits")
    if key.site in ATTENTION and loaded.wiring.rotary_by_length:
        raise ValueError(f"{key}: rotary frequencies of this model change with the length of the input")
    if key.site in ("head_input", "lm_logits") and shape.head not in LM_HEADS:
        raise ValueError(f"{key}: the model has the head {shape.head}, expected one of {', '.join(LM_HEADS)}")
    if key.site == "task_logits" and not shape.labels:
        raise ValueError(f"{key}: the model has the head {shape.head}, expected a task head")
    if key.site in ATTENTION and key.positions != "all":
        raise ValueError(f"{key}: attention is read between all tokens")
    if (key.positions == "row") != (key.site == "task_logits" and shape.head in ROW_HEADS):
        raise ValueError(f"{key}: the position row belongs to task_logits of whole rows, and those have no other")


def _sources(key: FeatureKey) -> tuple[Site, ...]:
    """The tensors that hooks read for ``key``."""
    layer = key.layer or 0
    if key.site in ATTENTION:
        return ("query", layer), ("key", layer)
    return (("head_input" if key.site == "lm_logits" else key.site, layer),)


def _nothing(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output[:, :0]


def _taken(value_BTW: Tensor, batch: Batch, positions: str) -> Tensor:
    """``take`` in float32, and of few tokens before the cast."""
    return take(value_BTW.float(), batch, "mean") if positions == "mean" else take(value_BTW, batch, positions).float()


def _has_trainable(loaded: LoadedModel, site: str, layer: int) -> bool:
    """Whether embeddings or blocks that ``site`` depends on have weights that train."""
    blocks = range(1, (layer if layer or site == "hidden" else loaded.shape.layers) + 1)
    below = [loaded.model.get_input_embeddings(), *(module for i in blocks for module in stand_ins(loaded.block(i)))]
    return any(weight.requires_grad for module in below for weight in module.parameters())
