"""Causal rows that know where a response begins: it alone is scored, whatever the tokenizer puts around and across it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_rows import gpt_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from online.batch import IGNORED
from online.collate import collate
from online.rows import build_rows, iter_groups
from online.rows_spec import RowsSpec, building_fingerprint
from store.manifest import Provenance
from store.reader import Store
from store.recode import places
from store.rows import Row
from store.strict import parse

WORDS = ["<pad>", "<unk>", "<eos>", "<s>", *"abcdefgh", "ask:", "answer:"]
MADE = Provenance(command=("tests",), versions={}, created="2026-01-01T00:00:00Z")


def words(around: str = "$A") -> PreTrainedTokenizerFast:
    """A token for each word, and special ones ``around`` a text."""
    numbers = {word: number for number, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 3), ("<eos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def spec(folder: Path, records: list[dict[str, str]], **options: Any) -> RowsSpec:  # noqa: ANN401
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, records)))
    rows = {"sources": [{"files": str(folder / "text.jsonl")}], "text": "ask: {q} answer: {a}", "objective": "causal", "response": "a"}
    return parse(RowsSpec, rows | {"max_length": 16, **options}, "rows")


def scored(tokenizer: PreTrainedTokenizerFast, row: Row) -> list[str]:
    """The tokens that are scored, after a check that each is its row's next one, and that they stand at its end."""
    assert row.token_labels is not None
    ids, labels = row.input_ids, row.token_labels
    places_of = np.flatnonzero(labels != IGNORED)
    assert row.labelled == len(places_of)
    assert labels[places_of].tolist() == ids[places_of + 1].tolist()
    assert not len(places_of) or places_of.tolist() == list(range(places_of[0], len(ids) - 1))
    return tokenizer.convert_ids_to_tokens(labels[places_of].tolist())


def one(tokenizer: PreTrainedTokenizerFast, made: RowsSpec) -> list[Row]:
    return [row for group in iter_groups(made, tokenizer) for row in group]


@pytest.mark.parametrize(
    ("around", "end"), [("$A", ["<eos>"]), ("<s> $A", ["<eos>"]), ("<s> $A <eos>", ["<eos>"]), ("$A <s>", ["<s>", "<eos>"])]
)
def test_the_response_and_what_ends_it_are_scored(around: str, end: list[str], tmp_path: Path) -> None:
    tokenizer = words(around)
    records = [{"q": "a b c", "a": "d e"}, {"q": "a", "a": ""}, {"q": "b b", "a": "f"}]
    rows = one(tokenizer, spec(tmp_path, records))
    assert [scored(tokenizer, row) for row in rows] == [["d", "e", *end], end, ["f", *end]]


def test_of_a_response_that_is_cut_what_is_left_is_scored_and_of_none_nothing(tmp_path: Path) -> None:
    tokenizer = words("<s> $A <eos>")
    records = [{"q": "a b", "a": "c d e f g h"}, {"q": "a b c d e f g h", "a": "d"}]
    rows = one(tokenizer, spec(tmp_path, records, max_length=9))
    assert [scored(tokenizer, row) for row in rows] == [["c", "d", "e", "<eos>"], []]


def test_text_behind_the_response_belongs_to_it(tmp_path: Path) -> None:
    rows = one(words(), spec(tmp_path, [{"q": "a b", "a": "c"}], text="{q} answer: {a} ask:"))
    assert scored(words(), rows[0]) == ["c", "ask:", "<eos>"]


def test_a_token_across_the_border_belongs_to_the_response(tmp_path: Path) -> None:
    tokenizer = gpt_tokenizer()
    [row] = one(tokenizer, spec(tmp_path, [{"q": "he", "a": "the"}], text="{q} {a}"))
    assert scored(tokenizer, row) == ["Ġthe", "<|end|>"]


def test_a_store_keeps_what_is_scored(tmp_path: Path) -> None:
    records = [{"q": "a b c", "a": "d e"}, {"q": "a", "a": ""}]
    build_rows(spec(tmp_path, records), words(), tmp_path / "store", MADE)
    store = Store.open(tmp_path / "store")
    batch = collate(store, np.arange(2))
    assert batch.token_labels is not None
    assert batch.labelled.nonzero().tolist() == [[0, 4], [0, 5], [0, 6], [1, 2]]
    assert batch.token_labels[batch.labelled].tolist() == [WORDS.index(word) for word in ("d", "e", "<eos>", "<eos>")]
    assert places(store, np.arange(2), "labels").tolist() == [4, 5, 6, 8 + 2]


def test_rows_without_a_response_are_as_they_always_were(tmp_path: Path) -> None:
    plain, answered = (spec(tmp_path, [{"q": "a", "a": "b"}], response=response) for response in (None, "a"))
    assert building_fingerprint(plain) != building_fingerprint(answered)
    [row] = one(words(), plain)
    assert (row.token_labels, row.labelled) == (None, 4)


@pytest.mark.parametrize("options", [{"objective": "plain"}, {"response": "b"}, {"text": "{a}", "long": "split"}])
def test_a_response_is_a_field_of_a_whole_causal_row(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="response: expected a field of a causal row's text, with long: truncate, found"):
        spec(tmp_path, [{"q": "a", "a": "b"}], **options)
