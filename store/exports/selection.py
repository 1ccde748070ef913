"""What is exported of a store: some of its features, for some of its rows."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from store.errors import MissingFeature
from store.features import FeatureKey
from store.manifest import Json
from store.reader import Store
from store.rows import NUMBERS
from store.strict import did_you_mean
from store.table import Ints

_SAID = {"teacher", "model", "dtype", "shape", "intervention"}
TOKENS_AT_ONCE = 8192
"""Tokens whose features are held in memory together, unless a single row has more."""


@dataclass(frozen=True)
class Selection:
    """Features, with their passes, of the rows of ``split`` (None for all) numbered from ``first`` on and before ``after``."""

    keys: tuple[FeatureKey, ...]
    split: str | None
    first: int
    after: int

    def members(self, store: Store, slot: int) -> Ints:
        """Numbers of the selected rows in a slot, ascending."""
        rows = store.rows.rows_of(slot)
        chosen = (rows >= self.first) & (rows < self.after)
        if self.split is not None and chosen.any():
            chosen &= store.rows.in_slot(slot)[:, NUMBERS.index("split")] == store.rows.splits.index(self.split)
        return rows[chosen]

    def slots(self, store: Store) -> Iterator[tuple[int, Ints]]:
        """Every slot with selected rows, and these."""
        for slot in range(store.manifest.rows.slots):
            if store.rows.first[slot] < self.after and store.rows.first[slot + 1] > self.first and len(rows := self.members(store, slot)):
                yield slot, rows

    def plan(self, store: Store, kind: str) -> Json:
        """What an export in format ``kind`` follows from; an unfinished one goes on only where all of it is the same."""
        rows = store.manifest.rows
        digest = hashlib.sha256()
        for name in sorted({key.pass_name for key in self.keys}):
            for slot, commit in sorted(store.committed(name).items()):
                digest.update(f"{name} {slot} {sorted(commit.files.items())}\n".encode())
        return {
            "format": kind,
            "features": [str(key) for key in self.keys],
            "split": self.split,
            "rows": [self.first, self.after],
            "corpus": rows.corpus,
            "building": rows.building,
            "answers": digest.hexdigest(),
        }

    def record(self, store: Store) -> dict[str, Json]:
        """What the values alone do not say."""
        rows = store.manifest.rows
        passes = {key.pass_name: store.manifest.passes[key.pass_name] for key in self.keys}
        return {
            "rows": {
                "objective": rows.objective,
                "task": rows.task.model_dump(),
                "domains": list(rows.domains),
                "pad_id": rows.pad_id,
                "tokenizer": rows.tokenizer,
            },
            "passes": {name: info.model_dump(mode="json", include=_SAID) for name, info in passes.items()},
        }


def select(store: Store, passes: Sequence[str], features: Sequence[str], split: str | None, first: int, after: int | None) -> Selection:
    """What options ask for: all stored features of ``passes`` (of all passes where none is named), or only ``features``.

    Raises:
        ValueError: no such pass, split or row; a feature without a pass where there are several.
        MissingFeature: a feature is not stored, or not yet for all rows that are asked for.
    """
    manifest = store.manifest
    if wrong := [name for name in passes if name not in manifest.passes]:
        raise ValueError(f"{store.path} has no pass {wrong[0]!r}{did_you_mean(wrong[0], sorted(manifest.passes))}")
    chosen = list(dict.fromkeys(passes)) or list(manifest.passes)
    store.rows.check_choice(split)
    total = len(store.rows)
    after = total if after is None else min(after, total)
    if not 0 <= first < after:
        raise ValueError(f"{store.path} has rows 0 to {total - 1}, asked for {first} to {after - 1}")
    keys = [_named(store, text, chosen) for text in features]
    if not features:
        keys = [spec.feature.of(name) for name in chosen for spec in manifest.passes[name].features]
    for key in keys:
        store.spec(key)
    selection = Selection(tuple(dict.fromkeys(keys)), split, first, after)
    wanted = [slot for slot, _ in selection.slots(store)]
    if not wanted:
        raise ValueError(f"no row of split {split!r} is among rows {first} to {after - 1} of {store.path}")
    for name in {key.pass_name for key in keys}:
        done = store.committed(name)
        if missing := [slot for slot in wanted if slot not in done]:
            raise MissingFeature(
                f"{store.path}: pass {name} lacks {len(missing)} of the {len(wanted)} shards that are asked for; "
                "start its dump again to go on, or choose fewer rows"
            )
    return selection


def pieces(store: Store, rows: Ints) -> Iterator[Ints]:
    """``rows`` cut into runs of about TOKENS_AT_ONCE tokens."""
    length = store.rows.at(rows).length
    ends = np.flatnonzero(np.diff((np.cumsum(length) - length) // TOKENS_AT_ONCE)) + 1
    yield from np.split(rows, ends)


def _named(store: Store, text: str, passes: Sequence[str]) -> FeatureKey:
    key = FeatureKey.parse(text)
    if key.pass_name:
        return key
    if len(passes) != 1:
        raise ValueError(f"{text}: expected the pass before the feature, as in {passes[0] if passes else 'pass'}/{text}; passes: {passes}")
    return key.of(passes[0])
