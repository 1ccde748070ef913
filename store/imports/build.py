"""From another program's files to a store: first the rows, then one pass, slot by slot.

Sources are read twice, because rows are frozen before anything is answered for them. An import that was cut short
starts its rows over or goes on with the first slot that is not committed.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store import layout
from store.building import RowWriter
from store.codecs.topk import NO_TAIL
from store.errors import FingerprintMismatch, StoreError
from store.features import FeatureKey
from store.imports.samples import Sample, Source
from store.manifest import Json, PassInfo, Provenance, Task, read_manifest
from store.reader import Store
from store.rows import NUMBERS, Row
from store.shards import numpy_dtype
from store.table import RowTable
from store.writer import StoreWriter

READING = 1
"""Version of how other programs' files are read; any change that alters rows or answers bumps it."""
OBJECTIVE = "causal"


@dataclass(frozen=True)
class Target:
    """The store to make, and what no file says about it."""

    path: Path
    pass_name: str
    split: str
    slot_tokens: int
    bucket: int
    pad_id: int
    tokenizer: str
    """Fingerprint."""
    made: Provenance


@dataclass
class Imported:
    """What an import did."""

    rows: int
    tokens: int
    slots: int
    new_slots: int = 0
    """Those that this run committed."""
    positions: int = 0
    """Positions with words that this run committed, and how many of them have no mass left for others."""
    full: int = 0


Tick = Callable[[int], object]
"""Called with how many tokens were read since the last call."""


def import_rows(source: Source, target: Target, tick: Tick = lambda tokens: None) -> None:
    """Build the rows, unless the store has those of this import.

    Raises:
        ValueError: a record is not what it should be (names file and record).
        FingerprintMismatch: the store was made from other files, or with other options.
        StoreError: a file is damaged, or ``target.path`` holds something else.
    """
    options: Json = {"import": type(source).__name__, "files": _files(source), **source.options, "split": target.split}
    if layout.manifest(target.path).exists():
        _check_same(target, options)
        return
    next(source.records(0, answers=True), None)  # settings that do not fit show before a folder is made
    corpus = hashlib.sha256()
    with RowWriter(target.path, target.slot_tokens) as writer:
        for group, samples in enumerate(source.records(0, answers=False)):
            for sample in samples:
                _digest(corpus, sample)
            writer.append_group([_row(sample, group, target.split) for sample in samples])
            tick(sum(len(sample.input_ids) for sample in samples))
        writer.finish(
            copies=1,
            bucket=target.bucket,
            objective=OBJECTIVE,
            task=Task(kind="none"),
            pad_id=target.pad_id,
            tokenizer=target.tokenizer,
            corpus=corpus.hexdigest(),
            building=_building(target),
            options=options,
            made=target.made,
        )


def import_answers(source: Source, target: Target, info: PassInfo, tick: Tick = lambda tokens: None) -> Imported:
    """Commit what the teacher answered for every slot that lacks it; the rows must be there. Several processes may share them out.

    Raises:
        ValueError, StoreError: as :func:`import_rows`; the files hold other rows than those that were built.
    """
    with StoreWriter.open(target.path) as writer:
        store = Store.open(target.path)
        rows = store.rows
        writer.add_pass(target.pass_name, info, {})
        done = Imported(rows.info.rows, rows.info.tokens, rows.info.slots)
        before = np.concatenate([[0], np.cumsum([_groups(rows, slot) for slot in range(rows.info.slots)])])
        records: Iterator[list[Sample]] = iter(())
        expected = None
        for slot in writer.shards(target.pass_name):
            if slot != expected:
                records = source.records(int(before[slot]), answers=True)
            samples = list(itertools.chain.from_iterable(itertools.islice(records, int(before[slot + 1] - before[slot]))))
            _check_rows(store, slot, samples)
            arrays = _packed(rows, slot, samples, info)
            writer.commit(target.pass_name, slot, arrays)
            expected = slot + 1
            done.new_slots += 1
            for key, stored in arrays.items():
                if key.form.startswith("top"):
                    done.positions += len(stored["log_tail"])
                    done.full += int((stored["log_tail"] == NO_TAIL).sum())
            tick(int(rows.slot_tokens[slot]))
    return done


def _row(sample: Sample, group: int, split: str) -> Row:
    return Row(
        input_ids=sample.input_ids,
        segments=None,
        documents=sample.documents,
        token_labels=sample.token_labels,
        labelled=sample.labelled,
        label=None,
        group=group,
        copy=0,
        split=split,
        source=sample.file,
        record=sample.record,
        part=sample.part,
        spans=[],
    )


def _packed(rows: RowTable, slot: int, samples: list[Sample], info: PassInfo) -> dict[FeatureKey, dict[str, NDArray[Any]]]:
    """The answers for a slot, those of one row after the other."""
    packed: dict[FeatureKey, dict[str, NDArray[Any]]] = {}
    for spec in info.features:
        key = spec.feature
        units = int(rows.slot_units(key.positions)[slot])
        packed[key] = {array.name: np.empty((units, array.width), numpy_dtype(array)) for array in spec.arrays}
        for name, out in packed[key].items():
            start = 0
            for sample in samples:
                values = sample.answers[key][name]
                out[start : start + len(values)] = values
                start += len(values)
            assert start == units, (key, name, start, units)
    return packed


def _check_rows(store: Store, slot: int, samples: list[Sample]) -> None:
    """What the sources hold now must be what the rows were built from."""
    lengths = store.rows.in_slot(slot)[:, NUMBERS.index("length")].tolist()
    stored = store.tokens("input_ids", store.rows.rows_of(slot))
    found = np.concatenate([sample.input_ids for sample in samples]) if samples else np.zeros(0, np.int32)
    if [len(sample.input_ids) for sample in samples] != lengths or not np.array_equal(stored, found):
        raise StoreError(
            f"slot {slot} of {store.path} has other tokens than the sources hold now: they changed after its rows were built; "
            "put them back, or remove the folder and import again"
        )


def _groups(rows: RowTable, slot: int) -> int:
    """Groups, each of them one record, of a slot."""
    return int(rows.in_slot(slot)[-1, NUMBERS.index("group")]) + 1


def _digest(digest: Any, sample: Sample) -> None:  # noqa: ANN401
    """Everything of an input that rows are made from."""
    for values in (sample.input_ids, sample.documents, sample.token_labels):
        digest.update(b"-" if values is None else b"%d " % len(values))
        digest.update(b"" if values is None else np.ascontiguousarray(values).astype("<i4").tobytes())


def _files(source: Source) -> str:
    """Fingerprint of the names and sizes of all files; contents are compared slot by slot."""
    try:
        sizes = [[path.name, path.stat().st_size] for path in source.files]
    except OSError as error:
        raise StoreError(f"cannot read {error.filename}: {error.strerror}") from None
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()


def _building(target: Target) -> str:
    return hashlib.sha256(json.dumps(["import", READING, target.bucket, target.slot_tokens]).encode()).hexdigest()


def _check_same(target: Target, options: Json) -> None:
    rows = read_manifest(target.path).rows
    stored = {**rows.origins[0].options, "tokenizer": rows.tokenizer, "slot_tokens": rows.slot_tokens}
    for name, value in {**options, "tokenizer": target.tokenizer, "slot_tokens": target.slot_tokens}.items():
        if stored.get(name) != value:
            raise FingerprintMismatch(
                f"{target.path} holds a store made with another {name}: expected {stored.get(name)} as stored, found {value}; "
                "give the same files and options to go on, or another folder, or remove this one to import anew"
            )
