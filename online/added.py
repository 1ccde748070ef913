"""Add a tensor to a model's embedding output while it runs.

Shapes: B rows, T padded tokens, W width.
"""

from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from online.models import LoadedModel


class Added:
    """During a forward pass under this context, ``added_BTW`` is added to ``hidden.0``, out of place; None adds nothing.

    A Capture that is entered after it sees the sum.
    """

    def __init__(self, loaded: LoadedModel, added_BTW: Tensor | None) -> None:
        self._block = loaded.block(1)
        self._added_BTW = added_BTW
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> "Added":
        if self._added_BTW is not None:
            self._handle = self._block.register_forward_pre_hook(self._add, with_kwargs=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert self._added_BTW is not None
        if args:
            return (args[0] + self._added_BTW.to(args[0].dtype), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: kwargs[name] + self._added_BTW.to(kwargs[name].dtype)}
