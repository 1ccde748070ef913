"""Rows as a batch. B rows, T padded tokens; packed arrays hold the tokens of all rows one after the other."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from online.batch import IGNORED, PADDING, Batch, bucket
from store.errors import CorruptShard
from store.manifest import Task
from store.pairs import sound, stand_in_pairs
from store.reader import Store
from store.rows import Row

Ints = NDArray[np.int64]
ARRAYS = ("input_ids", "segments", "documents", "token_labels", "phrases", "interchange")


def collate(store: Store, rows: Ints) -> Batch:
    """The ``rows`` [B] of a store, in this order, padded on the right to the longest bucket among them.

    Raises:
        CorruptShard: a file of the rows is damaged, or pairs of rows take what the other has not.
    """
    info, numbers = store.manifest.rows, store.rows.at(rows)
    packed, labels = store.all_tokens(rows), store.rows.label_at(rows)
    domains = store.rows.domain_at(rows) if info.domains else None
    draws = store.rows.draw_at(rows) if info.paired and stand_in_pairs(rows, numbers.group) else None
    if draws is not None and not sound(packed["interchange"], numbers.length, draws):
        raise CorruptShard(
            f"the rows of {store.where} hold pairs of which one takes what the other has not; rows cannot be mended: remove the folder "
            "and start the dump again"
        )
    batch = _batch(rows, packed, numbers.length, labels, numbers.group, domains, draws, info.objective, info.task, info.pad_id)
    return replace(batch, verbalisers=torch.tensor(info.verbalisers)) if info.verbalisers else batch


def collate_rows(rows: Sequence[Row], objective: str, task: Task, pad_id: int) -> Batch:
    """The same for rows that are in no store yet; they are numbered from 0."""
    packed = {name: np.concatenate([getattr(row, name) for row in rows]) for name in ARRAYS if getattr(rows[0], name) is not None}
    lengths = np.array([len(row.input_ids) for row in rows])
    labels = np.array([np.nan if row.label is None else row.label for row in rows])
    groups = np.array([row.group for row in rows])
    domains = None if rows[0].domain is None else np.array([row.domain for row in rows])
    draws = None
    if rows[0].draw is not None and stand_in_pairs(np.arange(len(rows)), groups):
        draws = np.array([row.draw for row in rows])
    return _batch(np.arange(len(rows)), packed, lengths, labels, groups, domains, draws, objective, task, pad_id)


def _batch(
    rows: Ints,
    packed: Mapping[str, NDArray[Any]],
    lengths: Ints,
    labels: NDArray[np.float64],
    groups: Ints,
    domains: Ints | None,
    draws: Ints | None,
    objective: str,
    task: Task,
    pad_id: int,
) -> Batch:
    mask_BT = np.arange(bucket(int(lengths.max()))) < lengths[:, None]

    def padded(values: NDArray[Any] | None, fill: int) -> Tensor | None:
        if values is None:
            return None
        values_BT = np.full(mask_BT.shape, fill, np.int64)
        values_BT[mask_BT] = values
        return torch.from_numpy(values_BT)

    documents, token_labels = packed.get("documents"), packed.get("token_labels")
    starts = _starts(lengths, documents)
    if objective == "causal" and token_labels is None:  # otherwise only some words are scored, and the rows say which
        token_labels = np.append(packed["input_ids"][1:], IGNORED)
        token_labels[np.append(starts[1:], len(token_labels)) - 1] = IGNORED
    input_ids = padded(packed["input_ids"], pad_id)
    assert input_ids is not None
    return Batch(
        rows=torch.from_numpy(np.asarray(rows, np.int64)),
        input_ids=input_ids,
        mask=torch.from_numpy(mask_BT),
        segments=padded(packed.get("segments"), 0),
        documents=padded(documents, 0),
        position_ids=None if documents is None else padded(_within(starts, len(documents)), 0),
        token_labels=padded(token_labels, IGNORED),
        row_labels=_row_labels(labels, task),
        groups=torch.from_numpy(np.asarray(groups, np.int64)),
        domains=None if domains is None else torch.from_numpy(np.asarray(domains, np.int64)),
        phrases=padded(packed.get("phrases"), 0),
        interchange=None if draws is None else padded(packed["interchange"], -1),
        draws=None if draws is None else torch.from_numpy(np.asarray(draws, np.int64)),
    )


def _starts(lengths: Ints, documents: NDArray[Any] | None) -> Ints:
    """Where a row, or a document inside one, begins in packed tokens."""
    begins = np.zeros(int(lengths.sum()), bool)
    begins[np.cumsum(lengths) - lengths] = True
    if documents is not None:
        begins[1:] |= (documents[1:] != documents[:-1]) & (documents[1:] != PADDING)  # which goes on counting its row's positions
    return np.flatnonzero(begins)


def _within(starts: Ints, tokens: int) -> Ints:
    """Number of each packed token inside its document."""
    return np.arange(tokens) - np.repeat(starts, np.diff(starts, append=tokens))


def _row_labels(labels: NDArray[np.float64], task: Task) -> Tensor | None:
    if task.kind in ("none", "token") or np.isnan(labels).all():
        return None
    if task.kind == "regression":
        return torch.from_numpy(labels.astype(np.float32))
    return torch.from_numpy(np.nan_to_num(labels, nan=IGNORED).astype(np.int64))
