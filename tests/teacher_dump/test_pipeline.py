"""Answers behind the forward pass: what is stored, what it takes in memory, and what becomes of errors."""

import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from tiny_dump import stored_bytes

from online.batch import Batch
from online.collate import collate
from online.encode import encode, encode_on_device
from online.pending import Pending
from store.building import RowWriter
from store.codecs import feature_spec
from store.errors import StoreError
from store.features import FeatureKey, FeatureSpec
from store.manifest import PassInfo, Provenance, Task
from store.reader import Store
from store.rows import Row
from store.shape import ModelShape, Wiring
from store.table import Ints
from store.writer import StoreWriter
from teacher_dump.batches import ShardBuffer, cut
from teacher_dump.pipeline import SHARDS, Pipeline, memory_limit, shard_bytes

PASS = "bert"
WIDTH = 2048
SHAPE = ModelShape(
    family="bert", head="masked_lm", layers=1, width=WIDTH, heads=2, kv_heads=2, head_width=8, vocab=60, causal=False, pre_norm=False,
    windows=(None,),
)  # fmt: skip
SPECS = (
    feature_spec(FeatureKey("hidden", 1), "float32", WIDTH),
    feature_spec(FeatureKey("hidden", 1, "mean"), "int8", WIDTH),
    feature_spec(FeatureKey("lm_logits", None, "labels", "top4"), "float16", 60),
)
MADE = Provenance(command=(), versions={}, created="")


def write_rows(path: Path) -> None:
    """Forty rows of 3 to 40 tokens in shards of 128, every third token labelled."""
    draw = Random(0)
    with RowWriter(path, 128) as writer:
        for number in range(40):
            length = draw.randint(3, 40)
            labels = np.full(length, -100, np.int32)
            labels[::3] = 7
            row = Row(
                input_ids=np.full(length, number, np.int32), segments=None, documents=None, token_labels=labels,
                labelled=len(labels[::3]), label=None, group=number, copy=0, split="train", source="words.txt", record=number, part=0,
                spans=[],
            )  # fmt: skip
            writer.append_group([row])
        writer.finish(
            copies=1, bucket=16, objective="mlm", task=Task(kind="none"), pad_id=0, tokenizer="", corpus="", building="", options={},
            made=MADE,
        )  # fmt: skip


@dataclass(frozen=True)
class World:
    """A store without features, and a teacher of random numbers for it."""

    store: Store
    writer: StoreWriter

    def batches(self, shard: int) -> list[Ints]:
        return cut(self.store.rows, self.store.rows.rows_of(shard), 64)

    def values(self, spec: FeatureSpec, batch: Batch) -> torch.Tensor:
        """Numbers that depend on row and place alone."""
        lead = {"all": batch.mask.shape, "mean": (len(batch.rows),)}.get(spec.feature.positions, (int(batch.labelled.sum()),))
        first = torch.arange(int(np.prod(lead))).reshape(lead)
        width = SHAPE.vocab if spec.feature.form else WIDTH
        return torch.sin(first[..., None] * 1.7 + torch.arange(width) * 0.3 + float(batch.rows.sum()))

    def pending(self, members: Ints, spoilt: bool = False) -> Pending:
        batch = collate(self.store, members)
        values = {spec.feature: self.values(spec, batch) for spec in SPECS}
        if spoilt:
            values[SPECS[0].feature][-1, 1, 5] = torch.nan
        sources = [f"words.txt, record {row}" for row in members]
        return Pending([encode_on_device(spec.feature, values[spec.feature], batch, spec) for spec in SPECS], batch, sources)

    def pipeline(self, limit: int | None = None, committed: Callable[[int, int, float], None] = lambda *_: None) -> Pipeline:
        limit = memory_limit(self.store.rows, SPECS) if limit is None else limit
        return Pipeline(self.writer, PASS, self.store.rows, SPECS, limit, committed)

    def put(self, pipeline: Pipeline, *shards: int) -> None:
        """All of these shards, one after the other."""
        for shard in shards:
            for members in self.batches(shard):
                pipeline.put(shard, members, self.pending(members))
            pipeline.finish(shard, 64)

    @property
    def shards(self) -> range:
        return range(self.store.manifest.rows.slots)

    @property
    def done(self) -> set[int]:
        return set(Store.open(self.store.path).committed(PASS))


def open_world(path: Path) -> Iterator[World]:
    write_rows(path)
    with StoreWriter.open(path) as writer:
        info = PassInfo(
            teacher="", model="", dtype="float32", shape=SHAPE, wiring=Wiring(), requested=tuple(spec.key for spec in SPECS),
            features=SPECS, statics=(), shipped=False, made=MADE,
        )  # fmt: skip
        writer.add_pass(PASS, info, {})
        yield World(Store.open(path), writer)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    yield from open_world(tmp_path / "store")


@pytest.fixture
def other(tmp_path: Path) -> Iterator[World]:
    yield from open_world(tmp_path / "other")


def slow_down(writer: StoreWriter, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every commit takes so much longer."""
    commit = writer.commit

    def slowly(*arguments: object) -> int:
        time.sleep(seconds)
        return commit(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "commit", slowly)


def test_batches_in_any_order_are_stored_as_one_after_the_other(world: World, other: World) -> None:
    told: list[tuple[int, int]] = []
    with world.pipeline(committed=lambda shard, size, _: told.append((shard, size))) as pipeline:
        for shard in world.shards:
            batches = world.batches(shard)
            Random(shard).shuffle(batches)
            for members in batches:
                pipeline.put(shard, members, world.pending(members))
            pipeline.finish(shard, 64)
    for shard in other.shards:
        buffer = ShardBuffer(other.store.rows, shard, SPECS)
        for members in other.batches(shard):
            batch = collate(other.store, members)
            buffer.place(members, {spec.feature: encode(spec.feature, other.values(spec, batch), batch, spec) for spec in SPECS})
        other.writer.commit(PASS, shard, buffer.arrays)
    assert stored_bytes(world.store.path) == stored_bytes(other.store.path)
    commits = Store.open(world.store.path).committed(PASS)
    assert told == [(shard, sum(seal.size for seal in commits[shard].files.values())) for shard in world.shards]
    assert pipeline.waiting == 0


def test_two_shards_may_be_filled_at_once(world: World) -> None:
    with world.pipeline() as pipeline:
        for members in sorted(world.batches(0) + world.batches(1), key=lambda members: int(members[-1]) % 3):
            pipeline.put(int(world.store.rows.at(members).slot[0]), members, world.pending(members))
        pipeline.finish(1, 64)
        pipeline.finish(0, 64)
    assert world.done == {0, 1}


def test_a_slow_disk_holds_the_teacher_up_and_memory_stays_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(world.writer, 0.1, monkeypatch)
    limit = memory_limit(world.store.rows, SPECS)
    assert limit == SHARDS * shard_bytes(world.store.rows, SPECS).max() < len(world.shards) * shard_bytes(world.store.rows, SPECS).min()
    most = 0
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        with world.pipeline() as pipeline:
            for shard in world.shards:
                for members in world.batches(shard):
                    pipeline.put(shard, members, world.pending(members))
                    most = max(most, pipeline.waiting)
                pipeline.finish(shard, 64)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert limit // 2 < most <= limit
    assert peak < limit + limit // SHARDS + (1 << 20) + (1 << 18)  # the arrays of shards; a writer holds a chunk and a megabyte
    assert pipeline.waited > 0.1
    assert world.done == set(world.shards)


def test_without_room_one_batch_at_a_time_goes_through(world: World) -> None:
    sizes = shard_bytes(world.store.rows, SPECS)
    with world.pipeline(limit=1) as pipeline:
        for members in world.batches(0):
            pending = world.pending(members)
            pipeline.put(0, members, pending)
            assert pipeline.waiting <= sizes[0] + pending.nbytes
        pipeline.finish(0, 64)
        world.put(pipeline, 1)
    assert world.done == {0, 1}


def test_a_number_that_is_not_finite_stops_the_run_and_names_its_row(world: World) -> None:
    first, second, *_ = world.batches(1)

    def run() -> None:
        with world.pipeline() as pipeline:
            world.put(pipeline, 0)
            pipeline.drain()
            pipeline.put(1, first, world.pending(first))
            pipeline.put(1, second, world.pending(second, spoilt=True))
            while True:  # the teacher goes on until it hears of it
                pipeline.check()
                time.sleep(0.001)

    with pytest.raises(ValueError, match=rf"hidden.1@all of row {second[-1]} \(words.txt, record {second[-1]}\): the teacher answers NaN"):
        run()
    assert world.done == {0}


def test_a_full_disk_stops_the_run_and_the_next_one_completes_the_store(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = world.writer.commit

    def full(name: str, shard: int, *arguments: object) -> int:
        if shard == 1:
            raise StoreError("no space left on device")
        return commit(name, shard, *arguments)  # type: ignore[arg-type]

    def run() -> None:
        with world.pipeline() as pipeline:
            world.put(pipeline, *world.writer.pending(PASS))

    monkeypatch.setattr(world.writer, "commit", full)
    with pytest.raises(StoreError, match="no space left"):
        run()
    assert world.done == {0}
    monkeypatch.undo()
    run()
    assert world.done == set(world.shards)


def test_leaving_with_an_error_gives_up_what_is_not_being_committed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(world.writer, 0.5, monkeypatch)
    members = world.batches(2)[0]
    pipeline = world.pipeline(limit=1 << 30)

    def run() -> None:
        with pipeline:
            world.put(pipeline, 0, 1)
            pipeline.put(2, members, world.pending(members))
            raise KeyboardInterrupt

    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        run()
    assert time.perf_counter() - started < 5
    assert world.done <= {0}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("placer", "writer"))]


def test_a_dropped_shard_is_forgotten_and_can_be_made_again(world: World) -> None:
    with world.pipeline() as pipeline:
        world.put(pipeline, 0)
        for members in world.batches(1)[:2]:
            pipeline.put(1, members, world.pending(members))
        pipeline.drop(1)
        pipeline.drop(2)
        pipeline.drain()
        assert pipeline.waiting == 0
        assert world.done == {0}
        world.put(pipeline, 1)
    assert world.done == {0, 1}
