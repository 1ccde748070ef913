"""A teacher known by its configuration alone: its weights and where they are, and what its answers take beside them.

The model is built of tensors that have a shape and no data: one of a hundred billion weights takes a second and no memory, and it
can be run, by the code that runs the real one.

Shapes: B rows, T padded tokens, U tokens that are not padding, N labelled tokens.
"""

import copy
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from online.batch import IGNORED, Batch
from online.capture import check_key
from online.families import submodule
from online.flops import ForwardFlops, forward_flops
from online.models import check_length, load_config
from online.planner import Units
from online.skeleton import of_config
from online.statics import live_statics
from store.manifest import Provenance
from teacher_dump.recipe import DumpRecipe
from teacher_dump.selection import Request
from teacher_dump.teacher import TeacherPass, pass_of

_CPU = torch.device("cpu")
_DEALT = ("colwise", "rowwise", "embedding_rowwise")
"""Ways of transformers' plans to split a weight, or what their names begin with."""


@dataclass(frozen=True)
class Sketch:
    """A teacher without its weights, with what a recipe keeps of its answers."""

    teacher: TeacherPass
    """Its tensors have no data; its shape, wiring and stored features are those of the real one."""
    flops: ForwardFlops
    _fake: FakeTensorMode
    _known: dict[tuple[int, int, int], int] = field(default_factory=dict)

    @property
    def _model(self) -> nn.Module:
        return self.teacher.loaded.model

    @cached_property
    def itemsize(self) -> int:
        """Bytes of a weight, and of each number of a hidden state."""
        dtype: torch.dtype = getattr(torch, self.teacher.info.dtype)
        return dtype.itemsize

    @cached_property
    def elements(self) -> int:
        """Weights of the model; tied ones count once."""
        return sum(weight.numel() for weight in self._model.parameters())

    @cached_property
    def weights(self) -> int:
        """Bytes of them."""
        return _bytes(self._model.parameters())

    @cached_property
    def buffers(self) -> int:
        """Bytes that every rank holds beside them, such as rotary frequencies."""
        return _bytes(self._model.buffers())

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
        own = [list(module.parameters(recurse=False)) for module in self._model.modules()]
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
        head = self.teacher.loaded.word_head
        return head is not None and any(weight is self._words[0] for weight in head.parameters())

    @property
    def _blocks(self) -> list[nn.Module]:
        loaded = self.teacher.loaded
        return [loaded.block(layer) for layer in range(1, loaded.shape.layers + 1)]

    @property
    def _words(self) -> list[Tensor]:
        """The weights of word embedding and head, each once; biases left out."""
        modules = (self.teacher.loaded.model.get_input_embeddings(), self.teacher.loaded.word_head)
        weights = (weight for module in modules if module is not None for weight in module.parameters() if weight.dim() == 2)
        return list({id(weight): weight for weight in weights}.values())

    @cached_property
    def split(self) -> int:
        """Bytes of the weights that tensor parallelism deals out; each rank has the others as a whole. 0 where it cannot."""
        loaded, split = self.teacher.loaded, self.teacher.loaded.family.split
        if split is None:
            plan = getattr(loaded.model, "_tp_plan", None) or {}
            paths = "|".join(re.escape(name).replace(r"\*", r"\d+") for name, way in plan.items() if way.startswith(_DEALT))
            modules = [module for name, module in loaded.model.named_modules() if paths and re.fullmatch(paths, name)]
        else:
            modules = [submodule(block, path) for block in self._blocks for part in split for path in part]
        weights = [weight for weight in (getattr(module, "weight", None) for module in modules) if isinstance(weight, Tensor)]
        return _bytes({id(weight): weight for weight in (*weights, *(self._words if weights else ()))}.values())

    @cached_property
    def statics(self) -> int:
        """Bytes of the weights that derivations need."""
        return sum(weight.nbytes + 4 for weight in live_statics(self.teacher.loaded, self.teacher.plan.statics).values())

    def words(self, tokens: float, rows: float, labelled: float) -> float:
        """Tokens that go through the language-model head, of so many with their padding."""
        counts = {"all": tokens, "mean": tokens, "masked": labelled, "labels": labelled}
        asked = {spec.feature.positions for spec in self.teacher.specs if spec.feature.site == "lm_logits"}
        return sum(counts.get(positions, rows) for positions in asked)

    def batch_bytes(self, rows: int, tokens: int, labelled: int) -> int:
        """Peak bytes that the answers to a batch take on the device beside the weights: activations and what is captured.

        They are counted by answering it: every tensor that is made counts until it is dropped.

        Args:
            rows: B, each of ``tokens`` padded tokens, T, of which none is padding.
            labelled: N, of all rows.
        """
        key = (rows, tokens, labelled)
        if key not in self._known:
            with self._fake, torch.inference_mode(False):
                paired = self.teacher.info.intervention is not None
                batch = _batch(rows + rows % 2 if paired else rows, tokens, labelled, paired)
                present = [
                    *self._model.parameters(),
                    *self._model.buffers(),
                    *(value for value in vars(batch).values() if value is not None),
                ]
                with Allocations(present) as made:
                    self.teacher.start(batch)
            self._known[key] = made.peak
        return self._known[key]


def sketch(recipe: DumpRecipe, requests: tuple[Request, ...], units: Units, longest: int, made: Provenance) -> Sketch:
    """The teacher of ``recipe``, of which only config.json is read.

    Args:
        longest: Tokens of the longest row.

    Raises:
        ValueError: there is none, it cannot give a feature, or it takes shorter rows.
    """
    spec = recipe.teacher
    config = load_config(spec.model, spec.trust_remote_code)
    if spec.labels is not None:
        config.num_labels = spec.labels
    fake = FakeTensorMode()
    with fake:
        loaded = of_config(spec, copy.deepcopy(config))
        for request in requests:
            check_key(loaded, replace(request.key, form=""))
        check_length(loaded, longest)
        teacher = pass_of(recipe, requests, loaded, "", _CPU, units, made)
    return Sketch(teacher, forward_flops(config, spec.head, spec.modules, spec.trust_remote_code), fake)


def _bytes(weights: Iterable[Tensor]) -> int:
    return sum(weight.nbytes for weight in weights)


def _batch(rows: int, tokens: int, labelled: int, paired: bool) -> Batch:
    ids, number = torch.zeros(rows, tokens, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    batch = Batch(
        rows=number,
        input_ids=ids,
        mask=torch.ones(rows, tokens, dtype=torch.bool),
        segments=None,
        documents=None,
        position_ids=None,
        token_labels=torch.full_like(ids, IGNORED) if labelled else None,
        row_labels=None,
        groups=number,
        interchange=ids if paired else None,
        draws=number if paired else None,
    )
    # How many there are would have to be read from tensors without data.
    vars(batch).update(real=torch.zeros(rows * tokens, dtype=torch.int64), scored=torch.zeros(labelled, dtype=torch.int64))
    return batch


_COPIES = frozenset({torch.ops.aten.logsumexp.default})
"""Operations that work in a copy of their argument, which only the real ones make."""


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that are made under this context and not yet dropped: ``now``, and the most there were at once, ``peak``."""

    def __init__(self, present: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet(tensor.untyped_storage() for tensor in present)

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        if func is torch.ops.aten._local_scalar_dense.default:  # whether words are equally likely: they are not
            return False
        made = func(*args, **(kwargs or {}))
        if func in _COPIES:
            argument = args[0]
            assert isinstance(argument, Tensor)
            self.peak = max(self.peak, self.now + argument.nbytes)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:  # a view, or written in place
            return
        size = storage.nbytes()
        self._known.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size
