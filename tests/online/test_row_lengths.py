"""Texts that are longer or shorter than a row: cut, split, packed."""

from pathlib import Path

import pytest
from text_rows import jsonl, rows, spec, tokens
from transformers import PreTrainedTokenizerFast

from online.rows_spec import RowsSpec
from store.strict import parse


def test_the_longer_segment_loses_its_end(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    letters = list("abcdefghij")
    for first, second in [(10, 2), (2, 10), (7, 6), (3, 3)]:
        files = jsonl(tmp_path / "a.jsonl", [{"x": " ".join(letters[:first]), "y": " ".join(letters[:second])}])
        [row] = rows(spec(files, text=["{x}", "{y}"], max_length=11), bert)
        n, m = first, second
        while n + m > 8:  # what longest-first means
            n, m = (n - 1, m) if n > m else (n, m - 1)
        assert tokens(bert, row).count(" ") + 1 == min(first + second, 8) + 3
        assert tokens(bert, row) in (
            f"[CLS] {' '.join(letters[:n])} [SEP] {' '.join(letters[:m])} [SEP]",
            f"[CLS] {' '.join(letters[: n + 1])} [SEP] {' '.join(letters[: m - 1])} [SEP]",  # a tie may fall to either side
        )


def test_a_single_text_is_cut_on_the_right_whatever_the_tokenizer_prefers(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    files = jsonl(tmp_path / "a.jsonl", [{"text": "the man said it was not nice"}])
    bert.truncation_side = "left"
    try:
        [row] = rows(spec(files, max_length=5), bert)
        assert bert.truncation_side == "left"
        assert bert.backend_tokenizer.truncation is None
    finally:
        bert.truncation_side = "right"
    assert tokens(bert, row) == "[CLS] the man said [SEP]"


@pytest.mark.parametrize("long", ["truncate", "split", "pack"])
def test_a_length_without_room_for_text_is_refused(tmp_path: Path, bert: PreTrainedTokenizerFast, long: str) -> None:
    files = jsonl(tmp_path / "a.jsonl", [{"text": "man"}])
    with pytest.raises(ValueError, match="max_length 2 leaves no room for text: expected at least 3"):
        rows(spec(files, max_length=2, long=long), bert)


def test_split_and_packed_rows_hold_the_whole_text(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    texts = ["the man said it was not nice !", "rome", "he turned on the water , the girl turned it", "a b c d e f g h"]
    files = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    split, packed = (rows(spec(files, max_length=6, long=long), bert) for long in ("split", "pack"))
    whole = " ".join(" ".join(bert.tokenize(text)) for text in texts)
    for found in (split, packed):
        text = " ".join(token for row in found for token in tokens(bert, row).split() if token not in ("[CLS]", "[SEP]"))
        assert text == whole
    assert [(row.record, row.part) for row in split] == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1)]
    assert all(row.documents is None for row in split)
    assert [len(row.input_ids) for row in packed[:-1]] == [6] * (len(packed) - 1)
    assert len({row.group for row in packed}) == len(packed)
    assert tokens(bert, packed[2]) == "[CLS] rome [SEP] [CLS] he [SEP]"
    assert packed[2].documents is not None
    assert packed[2].documents.tolist() == [0, 0, 0, 1, 1, 1]


def test_splits_are_packed_apart(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    sources = [
        {"files": jsonl(tmp_path / f"{n}.jsonl", [{"text": "man"}]), "split": split} for n, split in enumerate(("train", "dev", "train"))
    ]
    found = rows(parse(RowsSpec, {"sources": sources, "long": "pack", "max_length": 6}, "recipe"), bert)
    assert [(row.split, tokens(bert, row)) for row in found] == [("train", "[CLS] man [SEP] [CLS] man [SEP]"), ("dev", "[CLS] man [SEP]")]


def test_causal_documents_end_with_the_end_of_text_token(tmp_path: Path, gpt: PreTrainedTokenizerFast) -> None:
    files = jsonl(tmp_path / "a.jsonl", [{"text": "the end"}, {"text": "abcdefghij"}])
    truncated, split, packed = (
        rows(spec(files, objective="causal", max_length=8, long=long), gpt) for long in ("truncate", "split", "pack")
    )
    assert [gpt.decode(row.input_ids.tolist()) for row in truncated] == ["the end<|end|>", "abcdefgh"]
    assert [gpt.decode(row.input_ids.tolist()) for row in split] == ["the end<|end|>", "abcdefgh", "ij<|end|>"]
    assert [gpt.decode(row.input_ids.tolist()) for row in packed] == ["the end<|end|>a", "bcdefghi", "j<|end|>"]
    assert [row.labelled for row in packed] == [8 - 2, 7, 1]
    assert packed[0].documents is not None
    assert packed[0].documents.tolist() == [0] * 7 + [1]
    assert all(row.token_labels is None for row in truncated + split + packed)
