"""Write features into a model while it runs: interventions.

Source: Geiger et al. 2021, Causal Abstractions of Neural Networks, section 3 (interchange interventions).
Shapes: B rows, T padded tokens, W width of a feature, H heads, C outputs of the task head.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from online.capture import check_key
from online.models import LoadedModel
from online.taps import PROJECTIONS, Arguments, Tap, attention_module, computes_anew, first_argument, tap, with_first
from online.written_attention import ATTENTION, Write, attention_written
from store.features import FeatureKey


class Intervene:
    """During forward passes under this context, the tensor at each site is replaced, out of place, by what a function makes of it.

        def swap(hidden_BTW: Tensor) -> Tensor:
            return put(hidden_BTW, source_NW, positions=base_BT)

        with Intervene(loaded, {FeatureKey("hidden", 3): swap}), Capture(loaded, keys) as capture:
            forward(loaded, batch)
        features = capture.features(batch)

    A function gets the whole tensor of the site, padding included, in the dtype that the model computes in: [B, T, W];
    attention [B, H, T, T]; task_logits of whole rows [B, C], of decoders that classify [B, T, C]. Whatever follows is computed from
    what it returns; gradients flow through that as the caller has it, with or without.

    What is seen at a written site itself: a Capture entered inside Intervene sees what was written, one entered around it what was
    there before; both see the rest of the model as it runs on what was written. Attention that Capture answers with is always that of
    the captured queries and keys, never written scores or probabilities.

    Sites: ``input.i`` is written for all projections that read it, and not for the residual. ``query.i``, ``key.i`` and ``value.i``
    of a fused projection write a third of it. A block whose attention is written computes it in single steps, which equals eager
    attention to the bit in float32 and SDPA up to rounding; the other blocks keep theirs; in ``attention_scores.i`` pairs that may not
    attend hold the lowest number of the dtype. ``final`` of a post-norm model is ``hidden.N``. Under Capture, word logits are
    computed after the pass: write ``head_input`` with Capture inside; ``lm_logits`` is refused there.

    Args:
        writes: keys as for Capture, positions ``all`` (``row`` for task_logits of whole rows), no forms. Applied in their order.

    Raises:
        ValueError: the model has no such site; a function returns another shape or dtype; a site that tensor parallelism splits;
            gradient checkpointing, which computes blocks anew after the context has ended; a site that no pass has reached.
    """

    def __init__(self, loaded: LoadedModel, writes: Mapping[FeatureKey, Write]) -> None:
        for key in writes:
            check_key(loaded, key)
            if key.positions not in ("all", "row"):
                raise ValueError(f"{key}: a site is written as a whole; expected {key.at('all')}, and a function that changes some tokens")
        self._loaded = loaded
        self._writes = dict(writes)
        self._missing: set[FeatureKey] = set()
        self._running = False
        self._stack = ExitStack()

    def __enter__(self) -> "Intervene":
        model = self._loaded.model
        if computes_anew(model):
            raise ValueError("gradient checkpointing computes blocks anew without what was written; turn gradient_checkpointing off")
        self._missing = set(self._writes)
        with ExitStack() as stack:
            stack.callback(model.register_forward_pre_hook(self._starts).remove)
            stack.callback(model.register_forward_hook(self._ends, always_call=True).remove)
            for key, write in self._writes.items():
                if key.site in ATTENTION:
                    module = attention_module(self._loaded, key.layer or 0)
                    stack.enter_context(attention_written(module, {key.site: self._checked(key, write)}))
                else:
                    self._hook(stack, tap(self._loaded, (key.site, key.layer or 0)), key, self._checked(key, write))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()
        if error is None and self._missing:
            raise ValueError(
                f"{', '.join(map(str, sorted(self._missing)))}: not written, as no forward pass under Intervene came there (a block "
                "that another model's stand in for computes hidden states alone)"
            )

    def _starts(self, module: nn.Module, args: object) -> None:
        self._running = True

    def _ends(self, module: nn.Module, args: object, output: object) -> None:
        self._running = False

    def _hook(self, stack: ExitStack, place: Tap, key: FeatureKey, write: Write) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
            if key.site == "head_input" and not self._running:  # Capture asks the head for the logits of what was written
                return args, kwargs
            return with_first(args, kwargs, write(first_argument(args, kwargs)))

        def after(module: nn.Module, args: object, output: object) -> object:
            return place.written(output, write(place.read(output)))

        if place.takes_in:
            stack.callback(place.module.register_forward_pre_hook(before, with_kwargs=True).remove)
        else:
            stack.callback(place.module.register_forward_hook(after).remove)

    def _checked(self, key: FeatureKey, write: Write) -> Write:
        """``write``, whose input and output are looked at."""
        shape = self._loaded.shape

        def checked(old: Tensor) -> Tensor:
            split = (
                old.shape[1] != shape.heads
                if key.site in ATTENTION
                else key.site in PROJECTIONS and old.shape[-1] != shape.width_of(key.site)
            )
            if split:
                raise ValueError(
                    f"{key}: tensor parallelism splits it over the ranks; write hidden.i or input.i, or shard as zero3 or fsdp"
                )
            if key.site in ("head_input", "lm_logits") and not old.shape[1]:
                raise ValueError(f"{key}: {_NOT_FED[key.site]}")
            new = write(old)
            if new.shape != old.shape or new.dtype != old.dtype:
                raise ValueError(
                    f"{key}: expected a tensor of shape {list(old.shape)} and type {old.dtype}, found {list(new.shape)} and {new.dtype}"
                )
            self._missing.discard(key)
            return new

        return checked


_NOT_FED = {
    "head_input": "a Capture around Intervene feeds the language-model head nothing; enter it inside Intervene",
    "lm_logits": "Capture computes word logits after the pass, for chosen tokens alone; write head_input, or run without Capture",
}
