"""The micro-batches of a run as a map-style dataset: item k is what this rank reads for its k-th forward pass.

An item is a pure function of its number, so a resumed run starts in the middle without reading what came before, and
any number of loader processes gives the same items. Loader processes read rows and stored features; live teachers
answer in the training process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from online.batch import Batch
from online.collate import collate
from online.teacher import Fetched, LiveTeacher, Teacher
from store.errors import StoreError
from store.features import FeatureKey
from store.order import Order, source_of
from store.reader import Store


@dataclass(frozen=True)
class Source:
    """Rows of one split of a store, and who answers for them."""

    store: Store
    teacher: Teacher | None
    """None: rows without features, from which only methods without a teacher learn."""
    split: str | None = "train"
    weight: float = 1.0
    """How often its rows come by in an epoch."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one source with the stored arrays of their features."""

    source: int
    """Number of the source in ``MicroBatches.sources``."""
    taught: bool
    """Whether the source has a teacher."""
    batch: Batch
    arrays: dict[FeatureKey, dict[str, Tensor]]
    """``fetched`` as tensors, which travel between processes in shared memory."""

    @property
    def fetched(self) -> Fetched:
        """The same arrays as ``Teacher.features`` takes them."""
        return {key: {name: array.numpy() for name, array in arrays.items()} for key, arrays in self.arrays.items()}

    def to(self, device: torch.device) -> "MicroBatch":
        """The same rows on ``device``; the arrays stay, the teacher moves what it needs."""
        return replace(self, batch=self.batch.to(device))

    def pin_memory(self) -> "MicroBatch":
        """The same in page-locked memory; a data loader calls it."""
        values = {name: value.pin_memory() for name, value in vars(self.batch).items() if value is not None}
        batch = replace(self.batch, **values)
        arrays = {key: {name: array.pin_memory() for name, array in value.items()} for key, value in self.arrays.items()}
        return replace(self, batch=batch, arrays=arrays)


@dataclass(frozen=True)
class Failed:
    """An item that could not be read: the training process raises the error without the loader's traceback."""

    error: StoreError | ValueError


class MicroBatches(Dataset[MicroBatch | Failed]):
    """All micro-batches of a run on one rank, in order.

    ``batch_rows`` are shared out evenly over ranks and accumulation steps; where rows stand in groups (the choices of a
    question) a step takes as many whole groups as they hold on average.

    Raises:
        ValueError: ``batch_rows`` cannot be shared out evenly.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        batch_rows: int,
        accumulation: int,
        steps: int | None,
        epochs: float | None,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        ordered = tuple(source_of(source.store.rows, source.split, source.weight) for source in sources)
        group = max(1, *(round(len(units.rows) / len(units)) for source in ordered for units in source.copies))
        parts = world * accumulation
        if batch_rows % (group * parts):
            shares = " x ".join(
                [*([f"groups of {group} rows"] if group > 1 else []), f"{world} ranks", f"{accumulation} accumulation steps"]
            )
            raise ValueError(f"batch_rows: expected a multiple of {group * parts} ({shares}), found {batch_rows}")
        self.sources = tuple(sources)
        self.order = Order(ordered, batch_rows // group, seed)
        self.epoch_steps = self.order.steps_per_epoch
        assert (steps is None) != (epochs is None)
        self.steps = steps if steps is not None else max(1, math.ceil((epochs or 0) * self.epoch_steps))
        self.taught = tuple(source.teacher is not None for source in sources)
        self._share = rank, world, accumulation

    def __len__(self) -> int:
        return self.steps * self._share[2]

    def __getitem__(self, item: int) -> MicroBatch | Failed:
        rank, world, accumulation = self._share
        step, slot = divmod(item, accumulation)
        try:
            number, rows = self.order.part(step, rank, world, slot, accumulation)
            source = self.sources[number]
            fetched = {} if source.teacher is None else source.teacher.fetch(rows)
            arrays = {key: {name: torch.from_numpy(array) for name, array in value.items()} for key, value in fetched.items()}
            return MicroBatch(number, self.taught[number], collate(source.store, rows), arrays)
        except (StoreError, ValueError) as error:
            return Failed(error)

    def __getstate__(self) -> dict[str, object]:
        """What a spawned loader process needs: live models stay here."""
        sources = (replace(source, teacher=None) if isinstance(source.teacher, LiveTeacher) else source for source in self.sources)
        return {**self.__dict__, "sources": tuple(sources)}
