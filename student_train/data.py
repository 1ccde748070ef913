"""The micro-batches of a run as a map-style dataset: item k is what this rank reads for its k-th forward pass.

An item is a pure function of its number, so a resumed run starts in the middle without reading what came before, and
any number of loader processes gives the same items. Loader processes read rows and stored features; live teachers
answer in the training process.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from transformers import TrainingArguments

from online.batch import Batch, Features
from online.collate import collate
from online.teacher import Fetched, LiveTeacher, Teacher, Teachers
from store import order
from store.errors import StoreError
from store.filters import Where
from store.order import Order, Shuffle
from store.pool import pools
from store.reader import Allocate, Store
from store.table import Ints
from store.together import PassName
from student_train.micro_batch import MicroBatch
from student_train.recipe import DataSpec
from student_train.step import Survey

_META = 1 << 40
"""Part of the seed of the order of ``meta`` rows."""
_EARLY = 100
"""Steps in which all sources that matter should have come by."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Rows of one split of a store, and who answers for them. The other fields are those of a recipe's data."""

    store: Store
    teacher: Teacher | Teachers | None
    """None: rows without features, from which only methods without a teacher learn."""
    split: str | None = "train"
    weight: float = 1.0
    pass_name: PassName | None = None
    """Whose answers ``where`` is about."""
    where: Where | None = None
    shuffle: Shuffle = "random"
    window: int | None = None
    by_length: int | None = None

    @classmethod
    def of(cls, data: DataSpec, store: Store, teacher: Teacher | Teachers | None) -> Self:
        """The rows that ``data`` names."""
        return cls(store, teacher, data.split, data.weight, data.compared_pass, data.where, data.shuffle, data.window, data.by_length)

    def answers(self, batch: Batch, fetched: Fetched) -> Features:
        """What its teacher answers for ``batch``."""
        return {} if self.teacher is None else self.teacher.features(batch, fetched)

    def ordered(self) -> order.Source:
        """Its rows as an order draws from them; looks at all of them.

        Raises:
            ValueError: none meets ``where``.
        """
        copies = pools(self.store, self.split, self.where, self.pass_name)
        if self.where is not None:
            _log.info("%s: where leaves %s rows of split %s", self.store.where, f"{sum(pool.rows for pool in copies):,}", self.split)
        return order.Source(copies, self.weight, self.shuffle, self.window or order.WINDOW, self.by_length)


def survey(sources: Sequence[Source]) -> Survey:
    """The rows of the one source of a phase.

    Raises:
        ValueError: there are several, whose rows have the same numbers.
    """
    if len(sources) > 1:
        raise ValueError("its methods keep something for each row by its number: expected data from one store, found several")
    (source,) = sources
    numbers = np.sort(
        np.concatenate([pool.take(np.arange(len(pool))) for pool in pools(source.store, source.split, source.where, source.pass_name)])
    )
    return Survey(len(source.store.rows), numbers, source.store.rows.label_at(numbers))


@dataclass(frozen=True)
class Failed:
    """An item that could not be read: the training process raises the error without the loader's traceback."""

    error: StoreError | ValueError


class MicroBatches(Dataset[MicroBatch | Failed]):
    """All micro-batches of a run on one rank, in order.

    ``batch_rows`` are shared out evenly over ranks and accumulation steps; where rows stand in groups (the choices of a
    question) a step takes as many whole groups as they hold on average.

    Args:
        meta: Held-out rows, of which as many go with each micro-batch, from an order of their own.

    Raises:
        ValueError: ``batch_rows`` cannot be shared out evenly.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        meta: Source | None = None,
        batch_rows: int,
        accumulation: int,
        steps: int | None,
        epochs: float | None,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        ordered = tuple(source.ordered() for source in sources)
        group = max(1, *(round(sum(pool.rows for pool in source.copies) / source.sizes.sum()) for source in ordered))
        parts = world * accumulation
        if batch_rows % (group * parts):
            shares = " x ".join(
                [*([f"groups of {group} rows"] if group > 1 else []), f"{world} ranks", f"{accumulation} accumulation steps"]
            )
            raise ValueError(f"batch_rows: expected a multiple of {group * parts} ({shares}), found {batch_rows}")
        self.sources = tuple(sources)
        self.meta = meta
        self.order = Order(ordered, batch_rows // group, seed)
        self.meta_order = None if meta is None else Order((meta.ordered(),), batch_rows // group, seed ^ _META)
        self.epoch_steps = self.order.steps_per_epoch
        assert (steps is None) != (epochs is None)
        self.steps = steps if steps is not None else max(1, math.ceil((epochs or 0) * self.epoch_steps))
        self.taught = tuple(source.teacher is not None for source in self.sources)
        self._share = rank, world, accumulation

    def __len__(self) -> int:
        return self.steps * self._share[2]

    def __getitem__(self, item: int) -> MicroBatch | Failed:
        rank, world, accumulation = self._share
        step, slot = divmod(item, accumulation)
        try:
            number, rows = self.order.part(step, rank, world, slot, accumulation)
            micro_batch = _read(number, self.taught[number], self.sources[number], rows)
            if self.meta is None or self.meta_order is None:
                return micro_batch
            _, rows = self.meta_order.part(step, rank, world, slot, accumulation)
            return replace(micro_batch, meta=_read(number, self.taught[number], self.meta, rows))
        except (StoreError, ValueError) as error:
            return Failed(error)

    def firsts(self) -> list[int]:
        """The number of the first micro-batch of each source, of those that come by in the first steps; the same on all ranks."""
        steps: dict[int, int] = {}
        for step in range(min(self.steps, _EARLY)):
            steps.setdefault(self.order.turn(step)[0], step)
        return [step * self._share[2] for step in steps.values()]

    def __getstate__(self) -> dict[str, object]:
        """What a spawned loader process needs: live models stay here."""
        sources = (replace(source, teacher=None) if isinstance(source.teacher, LiveTeacher) else source for source in self.sources)
        return {**self.__dict__, "sources": tuple(sources)}


def _read(number: int, taught: bool, source: Source, rows: Ints) -> MicroBatch:
    """``rows`` of ``source`` with what its teacher reads ahead; in a loader process, in memory that is lent to the training process."""
    batch, teacher = collate(source.store, rows), source.teacher
    if get_worker_info() is None:
        return MicroBatch(number, taught, batch, {} if teacher is None else teacher.fetch(rows))

    def fetch(allocate: Allocate) -> Fetched:
        return {} if teacher is None else teacher.fetch(rows, allocate)

    return MicroBatch.lent(number, taught, batch, fetch)


def loader(data: MicroBatches, args: TrainingArguments) -> DataLoader[MicroBatch | Failed]:
    """Items in their order; a generator of its own, so that starting it draws nothing from the global one."""
    workers = args.dataloader_num_workers
    return DataLoader(
        data,
        collate_fn=itemgetter(0),
        num_workers=workers,
        prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        multiprocessing_context=args.dataloader_multiprocessing_context if workers else None,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        generator=torch.Generator().manual_seed(args.seed),
    )
