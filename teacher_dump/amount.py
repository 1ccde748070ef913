"""How much a teacher has to answer: the rows of a store, or as many as are said to come."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from online.batch import bucket
from online.rows_spec import RowsSpec
from store.features import FeatureKey, FeatureSpec
from store.shards import CHUNK, Shard, token_chunk
from store.table import Ints, RowTable
from teacher_dump.batches import padded_lengths


@dataclass(frozen=True)
class Amount:
    """Rows in shards. Shards of the same content are one kind."""

    kinds: Ints
    """[kinds, 3] rows, tokens and labelled tokens of a shard."""
    shards_of: Ints
    """[kinds] shards of each kind."""
    room: int
    """Tokens that a shard has room for."""
    longest: int
    """Padded tokens of the longest row."""
    padded: int
    """Tokens of all rows with their padding."""
    pairs: int
    """Pairs of tokens that attention is computed for: squares of padded lengths, summed."""

    @classmethod
    def of(cls, rows: RowTable, shards: Sequence[int] | None = None) -> "Amount":
        """The rows of a store, or those of some of its ``shards``."""
        chosen = range(rows.info.slots) if shards is None else shards
        lengths, counts = _lengths(rows, chosen)
        content = np.stack([rows.slot_rows, rows.slot_tokens, rows.slot_labelled], axis=1)[list(chosen)]
        kinds, shards_of = np.unique(content, axis=0, return_counts=True)
        return cls(kinds, shards_of, rows.info.slot_tokens, int(lengths.max()), int(lengths @ counts), int(lengths**2 @ counts))

    @classmethod
    def imagined(cls, tokens: float, length: int, spec: RowsSpec) -> "Amount":
        """So many tokens in rows of ``length`` tokens each, labelled and cut into shards as ``spec`` says.

        Raises:
            ValueError: no tokens, or rows that no shard has room for.
        """
        if tokens < 1 or length < 1:
            raise ValueError(f"--tokens and --length: expected at least 1, found {tokens:g} and {length}")
        in_shard = spec.slot_tokens // length
        if not in_shard:
            raise ValueError(
                f"rows of {length} tokens do not fit in a shard of {spec.slot_tokens}; raise rows.slot_tokens, or lower --length"
            )
        rows = math.ceil(tokens / length)
        full, rest = divmod(rows, in_shard)
        kinds = [(in_shard, full), (rest, 1)] if rest else [(in_shard, full)]
        labelled, padded = _labelled(length, spec), bucket(length)
        return cls(
            kinds=np.array([(number, number * length, number * labelled) for number, shards in kinds if shards], np.int64),
            shards_of=np.array([shards for _, shards in kinds if shards], np.int64),
            room=spec.slot_tokens,
            longest=padded,
            padded=rows * padded,
            pairs=rows * padded**2,
        )

    @property
    def shards(self) -> int:
        return int(self.shards_of.sum())

    @property
    def rows(self) -> int:
        return self._sum(0)

    @property
    def tokens(self) -> int:
        return self._sum(1)

    @property
    def labelled(self) -> int:
        return self._sum(2)

    def file_bytes(self, spec: FeatureSpec) -> int:
        """Length of all files of a stored feature, checksums and indexes included; of compressed ones the most that they can have."""
        return int(self._per_shard(spec) @ self.shards_of)

    def shard_bytes(self, spec: FeatureSpec) -> int:
        """Bytes of a stored feature in the fullest shard."""
        return int(self._units(spec.feature).max()) * spec.unit_bytes

    def _per_shard(self, spec: FeatureSpec) -> Ints:
        sizes = np.zeros(len(self.kinds), np.int64)
        for array in spec.arrays:
            raw = spec.feature.positions == "all" and array.compression == "none"
            chunk = token_chunk(self.room) if raw else CHUNK
            sizes += [Shard(array, self.room, units, chunk).size for units in self._units(spec.feature).tolist()]
        return sizes

    def _units(self, key: FeatureKey) -> Ints:
        if key.per_row:
            return self.kinds[:, 0]
        return self.kinds[:, 1 if key.positions == "all" else 2]

    def _sum(self, column: int) -> int:
        return int(self.kinds[:, column] @ self.shards_of)


def _lengths(rows: RowTable, shards: Sequence[int]) -> tuple[Ints, Ints]:
    """Padded lengths that rows have, and how many have each."""
    found: dict[int, int] = {}
    for shard in shards:
        for length, count in zip(*np.unique(padded_lengths(rows, rows.rows_of(shard)), return_counts=True), strict=True):
            found[int(length)] = found.get(int(length), 0) + int(count)
    return np.array(list(found), np.int64), np.array(list(found.values()), np.int64)


def _labelled(length: int, spec: RowsSpec) -> int:
    """Labelled tokens of a row."""
    if spec.objective == "causal":
        return length - 1
    if spec.cloze is not None:
        return 1
    if spec.objective == "mlm":
        return max(1, round(length * spec.mask_probability))
    return length if spec.task.kind == "token" else 0
