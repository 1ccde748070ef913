"""Small stores whose rows differ in split, group, masking copy, label and source, to choose among."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from small_store import MADE, pass_info

from store import FeatureSpec, Row, RowWriter, Store, StoreWriter, Task, encode

CLASSES = ("bad", "fine", "good")


@dataclass(frozen=True)
class Group:
    """Rows that stay together."""

    lengths: tuple[int, ...]
    split: str = "train"
    label: int | None = 0
    source: str = "data/news-1.jsonl"


def make(path: Path, groups: Sequence[Group], copies: int = 1, slot_tokens: int = 128) -> list[Row]:
    """A store of ``groups``, once for each masking copy; the rows by number. Every other token of row r has the label r mod 20."""
    rows: list[Row] = []
    number = 0
    with RowWriter(path, slot_tokens) as writer:
        for copy in range(copies):
            for group in groups:
                made = []
                for part, length in enumerate(group.lengths):
                    token_labels = np.full(length, -100, np.int32)
                    token_labels[1::2] = (len(rows) + part) % 20
                    row = Row(
                        input_ids=np.full(length, len(rows) % 50, np.int32), segments=None, documents=None, token_labels=token_labels,
                        labelled=length // 2, label=None if group.label is None else float(group.label), group=number, copy=copy,
                        split=group.split, source=group.source, record=number, part=part, spans=[],
                    )  # fmt: skip
                    made.append(row)
                writer.append_group(made)
                rows += made
                number += 1
        writer.finish(
            copies=copies, bucket=16, objective="mlm", task=Task(kind="classification", classes=CLASSES), pad_id=0, tokenizer="t",
            corpus="c", building="b", options={}, made=MADE,
        )  # fmt: skip
    return rows


def answer(path: Path, specs: Sequence[FeatureSpec], logits: dict[str, list[np.ndarray]]) -> None:
    """Store the pass ``bert``: ``logits`` of each feature for each row [units, width]."""
    store = Store.open(path)
    with StoreWriter.open(path) as writer:
        writer.add_pass("bert", pass_info(tuple(specs)), {})
        for shard in writer.pending("bert"):
            rows = store.rows.rows_of(shard)
            labels = store.tokens("token_labels", rows)
            arrays = {}
            for spec in specs:
                values = np.concatenate([logits[spec.key][row] for row in rows]).astype(np.float32)
                arrays[spec.feature] = encode(spec, values, None if spec.feature.per_row else labels[labels >= 0].astype(np.int64))
            writer.commit("bert", shard, arrays)
