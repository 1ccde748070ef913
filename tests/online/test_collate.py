"""Rows come out of a store as they went in, padded to their bucket, with labels aligned to the logits that are scored."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from online.batch import BUCKET, IGNORED
from online.collate import collate, collate_rows
from online.fingerprints import tokenizer_fingerprint
from online.rows import build_rows, iter_groups
from online.rows_spec import RowsSpec, building_fingerprint, corpus_fingerprint
from store.errors import StoreError
from store.manifest import Provenance, Task
from store.reader import Store
from store.rows import Row
from store.strict import parse

MADE = Provenance(command=("test",), versions={}, created="2000-01-01T00:00:00Z")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 ... w99, with [CLS], [SEP] and segments."""
    words = {word: number for number, word in enumerate([*SPECIAL, *(f"w{n}" for n in range(100))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names)


def text(length: int, seed: int = 0) -> str:
    return " ".join(f"w{n}" for n in np.random.default_rng([seed, length]).integers(0, 100, length))


def corpus(path: Path, lengths: list[int]) -> str:
    records = [{"text": text(n), "other": text(n // 2 + 1, 1), "label": n % 3, "score": n / 4} for n in lengths]
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def spec(files: str, **options: object) -> RowsSpec:
    return parse(RowsSpec, {"sources": [{"files": files}], "slot_tokens": 128, "max_length": 64, **options}, "recipe")


PAIRS = {"text": ["{text}", "{other}"], "label": {"column": "label", "classes": ["x", "y", "z"]}}
OPTIONS: dict[str, dict[str, object]] = {
    "pairs": PAIRS,
    "scores": {"label": {"column": "score", "score": True}},
    "masked": {"objective": "mlm", "copies": 2},
    "masked pairs": {"objective": "mlm", **PAIRS},
    "packed masked": {"objective": "mlm", "long": "pack"},
    "packed causal": {"objective": "causal", "long": "pack"},
    "split causal": {"objective": "causal", "long": "split"},
    "choices": {"choices": ["{other}", "w1 {other}"], "label": {"column": "label", "classes": [0, 1]}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_batch_from_a_store_is_the_batch_of_the_rows_that_were_built(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    lengths = [n for n in (3, 30, 1, 90, 17, 55, 8, 16) if name != "choices" or n % 3 < 2]
    built = spec(corpus(tmp_path / "a.jsonl", lengths), **OPTIONS[name])
    info = build_rows(built, tokenizer, tmp_path / "store", MADE)
    rows = [row for group in iter_groups(built, tokenizer) for row in group]
    store = Store.open(tmp_path / "store")
    assert info.rows == len(rows)
    assert info.slots > 1
    order = np.random.default_rng(0).permutation(len(rows))
    batch = collate(store, order)
    expected = collate_rows([rows[n] for n in order], built.objective, built.task, 0)
    same = batch.groups[:, None] == batch.groups
    assert torch.equal(same, expected.groups[:, None] == expected.groups)  # a store numbers groups by its slots
    for field in set(vars(batch)) - {"groups"}:
        found, wanted = getattr(batch, field), torch.from_numpy(order) if field == "rows" else getattr(expected, field)
        assert (found is None and wanted is None) or (found.dtype == wanted.dtype and torch.equal(found, wanted)), field
    longest = max(len(row.input_ids) for row in rows)
    assert batch.input_ids.shape == (len(rows), -(-longest // BUCKET) * BUCKET)
    for number, row in zip(range(len(rows)), order, strict=True):
        check_row(batch, number, rows[row])


def check_row(batch: object, number: int, row: Row) -> None:
    """One row of a batch, from the definition and without the code under test."""
    get = {name: None if value is None else value[number].tolist() for name, value in vars(batch).items()}
    n, padding = len(row.input_ids), len(get["mask"]) - len(row.input_ids)
    assert get["mask"] == [True] * n + [False] * padding
    assert get["input_ids"] == row.input_ids.tolist() + [0] * padding
    assert (get["segments"] is None) == (row.segments is None)
    if row.segments is not None:
        assert get["segments"][:n] == row.segments.tolist()
    if row.documents is not None:
        documents = row.documents.tolist()
        assert get["documents"][:n] == documents
        assert get["position_ids"][:n] == [documents[:t].count(documents[t]) for t in range(n)]
        labels = [row.input_ids[t + 1] if t + 1 < n and documents[t] == documents[t + 1] else IGNORED for t in range(n)]
    else:
        assert get["documents"] is get["position_ids"] is None
        labels = [*row.input_ids[1:].tolist(), IGNORED]
    if row.token_labels is not None:
        labels = row.token_labels.tolist()
    if get["token_labels"] is None:
        assert row.labelled == 0
    else:
        assert get["token_labels"] == labels + [IGNORED] * padding
        assert sum(label != IGNORED for label in labels) == row.labelled
    assert (get["row_labels"] is None) == (row.label is None)
    assert row.label is None or get["row_labels"] == row.label


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=5), min_size=1, max_size=5), st.booleans())
def test_causal_labels_and_positions_stop_at_documents(packed: list[list[int]], documented: bool) -> None:
    rows = []
    for number, pieces in enumerate(packed):
        ids = np.arange(1, sum(pieces) + 1, dtype=np.int32)
        documents = np.repeat(np.arange(len(pieces)), pieces).astype(np.uint16) if documented else None
        labelled = len(ids) - (len(pieces) if documented else 1)
        rows.append(Row(ids, None, documents, None, labelled, None, number, 0, "train", "a", number, 0, []))
    batch = collate_rows(rows, "causal", Task(kind="none"), 0)
    for number, row in enumerate(rows):
        check_row(batch, number, row)


def test_labels_have_the_type_of_their_task(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    files = corpus(tmp_path / "a.jsonl", [3, 4, 5])
    for name, expected in {
        "pairs": torch.tensor([0, 1, 2]),
        "scores": torch.tensor([0.75, 1.0, 1.25]),
        "packed causal": None,
    }.items():
        built = spec(files, **OPTIONS[name])
        rows = [row for group in iter_groups(built, tokenizer) for row in group]
        found = collate_rows(rows, built.objective, built.task, 0).row_labels
        assert (found is None and expected is None) or (found.dtype == expected.dtype and torch.equal(found, expected))
    assert (
        collate_rows([Row(np.ones(3, np.int32), None, None, None, 0, None, 0, 0, "", "", 0, 0, [])], "plain", built.task, 0).row_labels
        is None
    )


def contents(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*")) if file.is_file()
    }


def test_the_same_corpus_gives_the_same_store_byte_for_byte(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    files = corpus(tmp_path / "a.jsonl", list(range(1, 60)))
    built = spec(files, objective="mlm", copies=2, hold_out=0.2)
    first = build_rows(built, tokenizer, tmp_path / "first", MADE)
    second = build_rows(built, tokenizer, tmp_path / "second", MADE, read_rows=3)
    assert first == second
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert (first.corpus, first.building) == (corpus_fingerprint(built), building_fingerprint(built))
    assert first.tokenizer == tokenizer_fingerprint(tokenizer)
    assert (first.copies, first.bucket, first.objective, first.pad_id) == (2, BUCKET, "mlm", 0)
    assert first.origins[0].options["hold_out"] == 0.2
    with pytest.raises(StoreError, match="already holds a finished store"):
        build_rows(built, tokenizer, tmp_path / "first", MADE)


def test_where_a_row_came_from_reaches_the_row_table(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    files = corpus(tmp_path / "a.jsonl", [5, 9, 7])
    spans = [{"field": "text", "start": "label", "text": "first", "unit": "words"}]
    records = [json.loads(line) for line in Path(files).read_text().splitlines()]
    Path(files).write_text("\n".join(json.dumps({**record, "first": "w1 w2"}) for record in records))
    build_rows(spec(files, **PAIRS, spans=spans), tokenizer, tmp_path / "store", MADE)
    table = Store.open(tmp_path / "store").rows.table
    assert table.column("source").to_pylist() == [files] * 3
    assert table.column("record").to_pylist() == [0, 1, 2]
    assert table.column("label").to_pylist() == [2.0, 0.0, 1.0]
    assert table.column("spans").to_pylist() == [[{"start": 1 + n, "end": 3 + n}] for n in (2, 0, 1)]


def test_a_group_that_does_not_fit_in_a_slot_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    files = corpus(tmp_path / "a.jsonl", [63] * 4)
    with pytest.raises(ValueError, match=r"a\.jsonl, record 0: a group of 256 tokens in 4 rows does not fit in a slot of 128"):
        build_rows(spec(files, group="label"), tokenizer, tmp_path / "store", MADE)
    assert not (tmp_path / "store" / "manifest.json").exists()
