"""Read features out of a model while it runs.

Shapes: B rows, T padded tokens, W width of a feature, V words, C outputs of the task head.
"""

from collections.abc import Callable, Iterable
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from online.batch import Batch, Features, take
from online.derive import attention_probs, attention_scores
from online.families import submodule
from online.models import LM_HEADS, LoadedModel
from online.statics import live_statics
from store.features import FeatureKey

Site = tuple[str, int]
"""Site and layer of a tensor that a hook reads; 0 where a site has no layers."""

PROJECTIONS = ("query", "key", "value")
ATTENTION = ("attention_scores", "attention_probs")
ROW_HEADS = ("classification", "multiple_choice")


class Capture:
    """During one forward pass under this context, the features ``keys``.

        with Capture(loaded, keys) as capture:
            forward(loaded, batch)
        features = capture.features(batch)

    Where a module runs more than once, its first value is kept. A language-model head is fed no tokens while the
    model runs: word logits are computed in ``features``, for the tokens of the key alone.

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
        self._answering = False
        self._values: dict[Site, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        for key in self._keys:
            check_key(loaded, key)

    def __enter__(self) -> "Capture":
        self._values.clear()
        try:
            for site in sorted({site for key in self._keys for site in _sources(key)}):
                self._hook(site)
            if self._loaded.word_head is not None:
                module, takes_in = _before_words(self._loaded)
                feed = module.register_forward_pre_hook(self._feed_nothing) if takes_in else module.register_forward_hook(_nothing)
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
        """The features of the pass that has just run on ``batch``, float32.

        Raises:
            ValueError: no pass has run, or a tensor was computed without gradient where one is needed (re-entrant
                gradient checkpointing, frozen or no-grad blocks below trainable ones).
        """
        self._answering = True
        try:
            return {key: self._feature(key, batch) for key in sorted(self._keys)}
        finally:
            self._answering = False

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, site: Site) -> None:
        """Keep the first tensor that the module of ``site`` takes in or gives out."""
        module, takes_in, pick = _tap(self._loaded, site)
        width = self._loaded.shape.width_of(site[0])

        def keep(tensor: object) -> None:
            if site not in self._values:
                picked = pick(tensor)
                assert isinstance(picked, Tensor), site
                self._values[site] = self._loaded.weights.joined(picked, width) if site[0] in PROJECTIONS else picked

        def before(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            keep(args[0] if args else next(iter(kwargs.values())))

        def after(module: nn.Module, args: object, output: object) -> None:
            keep(output)

        self._handles.append(
            module.register_forward_pre_hook(before, with_kwargs=True) if takes_in else module.register_forward_hook(after)
        )

    def _feed_nothing(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args if self._answering else (args[0][:, :0], *args[1:])

    def _value(self, site: str, layer: int = 0) -> Tensor:
        if (site, layer) not in self._values:
            raise ValueError(f"{site}{f'.{layer}' if layer else ''} was not seen: run one forward pass under Capture first")
        tensor = self._values[site, layer]
        if self._grad and not tensor.requires_grad and _has_trainable(self._loaded, site, layer):
            raise ValueError(
                f"{site}{f'.{layer}' if layer else ''} carries no gradient although weights below it train; re-entrant gradient "
                "checkpointing does this: set use_reentrant to false"
            )
        return tensor

    def _feature(self, key: FeatureKey, batch: Batch) -> Tensor:
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

    def _word_logits(self, key: FeatureKey, batch: Batch) -> Tensor:
        """The head on the tokens of ``key`` alone: logits of a whole vocabulary for every token are rarely wanted."""
        head, cap = self._loaded.word_head, self._loaded.wiring.logit_cap
        assert head is not None
        whole, weights = key.positions in ("all", "mean"), self._loaded.weights
        input_BTW = self._value("head_input")
        with weights.calling(head):
            logits: Tensor = head(input_BTW if whole else take(input_BTW, batch, key.positions))
        logits = weights.joined(logits, self._loaded.shape.vocab)
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        if key.positions == "all" and not logits.requires_grad:  # nobody else has them: masked where they lie
            logits.view(-1, logits.shape[-1])[batch.padding] = 0
            return logits.float()
        return _taken(logits, batch, key.positions) if whole else logits.float()


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


def _tap(loaded: LoadedModel, site: Site) -> tuple[nn.Module, bool, Callable[[object], object]]:
    """Module to hook, whether its input is meant rather than its output, and what of that."""
    name, layer = site
    family = loaded.family
    if name in ("input", *PROJECTIONS):
        block, fused = loaded.block(layer), len(family.projections) == 1
        index = 0 if name == "input" else PROJECTIONS.index(name)
        module = submodule(block, family.projections[0 if fused else index])
        if name == "input":
            return module, True, _itself
        return module, False, (lambda output: output.chunk(3, dim=-1)[index]) if fused else _itself
    if name == "hidden" and layer == 0:
        return loaded.block(1), True, _itself
    if name == "hidden" or (name == "final" and family.final_norm is None):
        return loaded.block(layer or loaded.shape.layers), False, _first
    if name == "final":
        assert family.final_norm is not None
        return submodule(loaded.body, family.final_norm), False, _itself
    if name == "head_input":
        return *_before_words(loaded), _itself
    assert name == "task_logits", name
    score = getattr(loaded.model, "score", None)
    if loaded.shape.head == "classification" and loaded.shape.causal and isinstance(score, nn.Module):
        # decoders score every token; transformers finds the last one by its id, which may also end a row's text
        return score, False, _itself
    return loaded.model, False, lambda output: output.logits


def _before_words(loaded: LoadedModel) -> tuple[nn.Module, bool]:
    """The module where the head's input is met while the model runs, and whether it takes that in rather than gives it out."""
    family, head = loaded.family, loaded.word_head
    if family.head_rest is not None and family.transform is not None:  # narrow_head: what stands for the head is no part of the model
        return submodule(loaded.model, family.transform[1]), False
    assert head is not None
    return head, True


def _nothing(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output[:, :0]


def _itself(value: object) -> object:
    return value


def _first(value: object) -> object:
    """The hidden states of a block's output, which some architectures wrap in a tuple."""
    return value[0] if isinstance(value, tuple) else value


def _taken(value_BTW: Tensor, batch: Batch, positions: str) -> Tensor:
    """``take`` in float32, and of few tokens before the cast."""
    return take(value_BTW.float(), batch, "mean") if positions == "mean" else take(value_BTW, batch, positions).float()


def _has_trainable(loaded: LoadedModel, site: str, layer: int) -> bool:
    """Whether embeddings or blocks that ``site`` depends on have weights that train."""
    blocks = range(1, (layer if layer or site == "hidden" else loaded.shape.layers) + 1)
    below = [loaded.model.get_input_embeddings(), *(loaded.block(i) for i in blocks)]
    return any(weight.requires_grad for module in below for weight in module.parameters())
