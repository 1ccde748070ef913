"""What a teacher answered for whole rows, given to the rows of another store that are made of the same texts.

The two stores may be of different tokenizers: a row is known by the record that it was made of, not by its tokens. Only features with one
value for a row (task logits, sentence vectors) can go over; those of single tokens stand for tokens that the other side has not.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from store.errors import FingerprintMismatch
from store.features import PER_ROW
from store.manifest import PassInfo
from store.reader import Store
from store.rows import IDENTITY
from store.writer import StoreWriter

Tick = Callable[[int, int], object]
"""Called with how many shards are done, and of how many."""


def graft(source: Path, pass_name: str, target: Path, tick: Tick = lambda done, total: None) -> tuple[str, ...]:
    """Give the store ``target`` the pass ``pass_name`` of ``source``, as far as it is of whole rows, under the same name; the features.

    One that was stopped goes on. The source must be complete, and must have every row of the target.

    Raises:
        ValueError: no such pass, none of its features is of whole rows, or a row of the target that the source lacks.
        StoreError: a store is missing, damaged, busy or of other texts, or has another pass of this name.
    """
    there = Store.open(source)
    info = there.manifest.passes.get(pass_name)
    if info is None:
        raise ValueError(f"{source} has no pass {pass_name!r}; it has {', '.join(there.manifest.passes) or 'none'}")
    features = tuple(spec for spec in info.features if spec.feature.positions in PER_ROW)
    if not features:
        raise ValueError(
            f"pass {pass_name} of {source} has nothing of whole rows ({', '.join(spec.key for spec in info.features)}); what a token has "
            "means nothing to the tokens of another tokenizer"
        )
    given = info.model_copy(update={"features": features, "requested": tuple(spec.key for spec in features), "shipped": False})
    with StoreWriter.open(target) as writer:
        if writer.manifest.rows.corpus != there.manifest.rows.corpus:
            raise FingerprintMismatch(
                f"{target} and {source} are of other texts: expected the corpus {there.manifest.rows.corpus[:12]}, found "
                f"{writer.manifest.rows.corpus[:12]}; build both of the same sources, splits and columns"
            )
        places = _places(there, Store.open(target))
        writer.add_pass(pass_name, given, {})
        _fill(writer, there, pass_name, given, places, tick)
    return given.requested


def _fill(writer: StoreWriter, there: Store, pass_name: str, info: PassInfo, places: NDArray[np.int64], tick: Tick) -> None:
    done = writer.manifest.rows.slots - len(writer.pending(pass_name))
    for slot in writer.shards(pass_name):
        rows = places[writer.rows.rows_of(slot)]
        writer.commit(pass_name, slot, {spec.feature: there.read(spec.feature.of(pass_name), rows) for spec in info.features})
        done += 1
        tick(done, writer.manifest.rows.slots)


def _places(there: Store, here: Store) -> NDArray[np.int64]:
    """[rows of ``here``] the row of ``there`` that is made of the same text."""
    known = {one: number for number, one in enumerate(_identities(there.rows.table))}
    wanted = _identities(here.rows.table)
    if lacking := next((one for one in wanted if one not in known), None):
        record = ", ".join(f"{name} {value}" for name, value in zip(IDENTITY, lacking, strict=True))
        raise ValueError(f"{there.where} has no row of {record}, which {here.where} has: rows must not be cut or packed, nor left out")
    return np.array([known[one] for one in wanted], np.int64)


def _identities(table: pa.Table) -> list[tuple[object, ...]]:
    return list(zip(*(table.column(name).to_pylist() for name in IDENTITY), strict=True))
