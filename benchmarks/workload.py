"""What the store benchmarks read and write: ragged rows of 16-bit features, with the sizes of a small encoder's answers.

The values are random, drawn as such features are spread (normal hidden states, falling log-probabilities): no reader or writer
here compresses, so the bits do not matter.

Shapes: N rows, T their tokens, W width, K kept words.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store import FeatureKey, FeatureSpec, ModelShape, PassInfo, Provenance, Row, RowWriter, StoreWriter, Task, Wiring, feature_spec

Ints = NDArray[np.int64]
Arrays = dict[str, NDArray[Any]]

WIDTH, WORDS, VOCABULARY = 384, 64, 30_522
SLOT_TOKENS = 32_768
SHORTEST, LONGEST = 20, 128
PASS = "teacher"

WORDS_KEY = f"lm_logits@all:top{WORDS}"
KEYS = {
    "SUB": ("hidden.6@all", WORDS_KEY),
    "FULL": ("hidden.2@all", "hidden.4@all", "hidden.6@all", "query.6@all", "key.6@all", "value.6@all", WORDS_KEY),
}
"""One hidden state and the 64 likeliest words; three hidden states, queries, keys and values (3 x 384 wide) and the words."""

ROWS = {"SUB": 4096, "FULL": 1024}
"""About 310 and 380 MB."""

CHUNK = 128
"""Tokens of a chunk in other libraries' files: the best of 1, 8, 32 and 128 for slices of packed tokens."""

Read = Callable[[Ints], Sequence[NDArray[Any]]]
"""From row numbers [n] to their arrays."""

MADE = Provenance(command=("benchmarks",), versions={}, created="2026-01-01T00:00:00Z")


@dataclass(frozen=True)
class Workload:
    """All rows of a workload in memory."""

    name: str
    lengths: Ints
    """[N] tokens."""
    arrays: Arrays
    """[T, W] each: the rows one after another."""

    @cached_property
    def first(self) -> Ints:
        """[N + 1] first token of each row."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    @cached_property
    def shards(self) -> list[tuple[int, int]]:
        """First row and the one after the last, of each slot of SLOT_TOKENS tokens, filled as the store's row building does."""
        found, start = [], 0
        while start < len(self.lengths):
            stop = int(np.searchsorted(self.first, self.first[start] + SLOT_TOKENS, "right")) - 1
            found.append((start, stop))
            start = stop
        return found

    @property
    def tokens(self) -> int:
        return int(self.first[-1])

    @property
    def size(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    @cached_property
    def shard_first(self) -> Ints:
        """[shards] first row of each."""
        return np.array([start for start, _ in self.shards])

    @cached_property
    def shard_of(self) -> Ints:
        """[N] shard of each row."""
        return np.searchsorted(self.shard_first, np.arange(len(self.lengths)), "right") - 1

    def places(self, rows: Ints) -> tuple[list[int], list[int], list[int]]:
        """Shard of each row, its first token there and the one after the last."""
        shard = self.shard_of[rows]
        start = self.first[rows] - self.first[self.shard_first[shard]]
        return shard.tolist(), start.tolist(), (start + self.lengths[rows]).tolist()

    @cached_property
    def buffer(self) -> NDArray[np.uint8]:
        """Room for any batch of 64 rows, written to once: every reader puts its rows here."""
        token = sum(array.itemsize * array.shape[1] for array in self.arrays.values())
        return np.ones(64 * LONGEST * token + 64 * len(self.arrays), np.uint8)

    def packed(self, tokens: int) -> list[NDArray[Any]]:
        """Packed arrays [tokens, W] inside the buffer."""
        found, end = [], 0
        for array in self.arrays.values():
            start = -(-end // 64) * 64
            end = start + tokens * array.shape[1] * array.itemsize
            found.append(self.buffer[start:end].view(array.dtype).reshape(tokens, -1))
        return found

    def of_rows(self, start: int, stop: int) -> Arrays:
        """The arrays of consecutive rows; views."""
        return {name: array[self.first[start] : self.first[stop]] for name, array in self.arrays.items()}

    def batches(self, size: int, seed: int) -> Iterator[Ints]:
        """All rows in random order, ``size`` at a time."""
        order = np.random.default_rng(seed).permutation(len(self.lengths))
        return (order[start : start + size] for start in range(0, len(order) - size + 1, size))

    def expected(self, rows: Ints) -> Arrays:
        """The packed arrays of ``rows``."""
        return {name: np.concatenate([array[self.first[row] : self.first[row + 1]] for row in rows]) for name, array in self.arrays.items()}


def gather(sources: Sequence[NDArray[Any]], workload: Workload) -> Read:
    """Slices of arrays that lie in memory or are mapped into it, copied once."""

    def read(rows: Ints) -> Sequence[NDArray[Any]]:
        spans = list(map(slice, workload.first[rows].tolist(), workload.first[rows + 1].tolist()))
        packed = workload.packed(int(workload.lengths[rows].sum()))
        for source, out in zip(sources, packed, strict=True):
            np.concatenate([source[span] for span in spans], out=out)
        return packed

    return read


def specs(name: str) -> tuple[FeatureSpec, ...]:
    """The features of a workload as the store keeps them."""
    return tuple(feature_spec(FeatureKey.parse(key), "float16", VOCABULARY if key == WORDS_KEY else WIDTH) for key in KEYS[name])


def array_name(key: FeatureKey, array: str) -> str:
    """What an array is called in ``Workload.arrays``."""
    return array or key.name


def draw(name: str, rows: int, seed: int = 0) -> Workload:
    """A workload of so many rows."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(SHORTEST, LONGEST + 1, rows)
    tokens = int(lengths.sum())
    arrays: Arrays = {}
    for spec in specs(name):
        if spec.codec == "topk":
            falling = -np.cumsum(rng.gamma(0.4, 0.5, (tokens, WORDS)).astype(np.float32), axis=1)
            arrays["ids"] = (rng.random((tokens, WORDS), np.float32) ** 3 * VOCABULARY).astype(np.uint16)
            arrays["log_probs"] = falling.astype(np.float16)
            arrays["log_tail"] = rng.normal(-3, 1, (tokens, 1)).astype(np.float32)
        else:
            arrays[spec.feature.name] = rng.standard_normal((tokens, WIDTH), np.float32).astype(np.float16)
    return Workload(name, lengths, arrays)


def write_rows(path: Path, workload: Workload) -> None:
    """A store of the workload's rows that has no features yet."""
    rng = np.random.default_rng(1)
    with RowWriter(path, SLOT_TOKENS) as writer:
        for number, length in enumerate(workload.lengths.tolist()):
            row = Row(
                input_ids=rng.integers(0, VOCABULARY, length, np.int32), segments=None, documents=None, token_labels=None, labelled=0,
                label=None, group=number, copy=0, split="train", source="random", record=number, part=0, spans=[],
            )  # fmt: skip
            writer.append_group([row])
        writer.finish(
            copies=1, bucket=16, objective="plain", task=Task(kind="none"), pad_id=0, tokenizer="", corpus="", building="", options={},
            made=MADE,
        )  # fmt: skip


def pass_info(features: tuple[FeatureSpec, ...]) -> PassInfo:
    """A pass that holds these features."""
    shape = ModelShape(
        family="bert", head="masked_lm", layers=6, width=WIDTH, heads=12, kv_heads=12, head_width=32, vocab=VOCABULARY, causal=False,
        pre_norm=False, windows=(None,) * 6,
    )  # fmt: skip
    return PassInfo(
        teacher="", model="", dtype="float16", shape=shape, wiring=Wiring(), requested=tuple(spec.key for spec in features),
        features=features, statics=(), shipped=False, made=MADE,
    )  # fmt: skip


def writer_of(path: Path, workload: Workload) -> StoreWriter:
    """A writer of the store of ``write_rows`` that knows the workload's features."""
    writer = StoreWriter.open(path)
    writer.add_pass(PASS, pass_info(specs(workload.name)), {})
    return writer


def commit_all(writer: StoreWriter, workload: Workload) -> None:
    """Commit every shard, and let go of the store."""
    with writer:
        for shard, (start, stop) in enumerate(workload.shards):
            values = workload.of_rows(start, stop)
            features = ((spec.feature, spec.arrays) for spec in specs(workload.name))
            writer.commit(
                PASS, shard, {key: {array.name: values[array_name(key, array.name)] for array in arrays} for key, arrays in features}
            )
