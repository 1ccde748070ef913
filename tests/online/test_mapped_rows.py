"""Rows in which each word that a student drops is replaced by the one that stands for it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from text_rows import jsonl, rows, spec, vocabulary
from transformers import PreTrainedTokenizerFast

from online.batch import IGNORED
from online.kept_words import KeptWords
from online.rows_spec import building_fingerprint


@pytest.fixture
def student(tmp_path: Path, bert: PreTrainedTokenizerFast) -> Path:
    """The map of a student that reads girl as man and rome as paris."""
    words = bert.get_vocab()
    return written(tmp_path / "student", words, {words["girl"]: words["man"], words["rome"]: words["paris"]})


def written(folder: Path, words: dict[str, int], stand_ins: dict[int, int]) -> Path:
    kept = [number for number in range(len(words)) if number not in stand_ins]
    places = [kept.index(stand_ins.get(number, number)) for number in range(len(words))]
    folder.mkdir()
    KeptWords(torch.tensor(kept), torch.tensor(places)).write(folder)
    return folder


TEXT = "the girl lives in rome , the man in paris"


def test_words_that_are_dropped_are_read_as_others(tmp_path: Path, bert: PreTrainedTokenizerFast, student: Path) -> None:
    files = jsonl(tmp_path / "a.jsonl", [{"text": TEXT}])
    [row] = rows(spec(files, vocabulary=str(student)), bert)
    assert bert.decode(row.input_ids[1:-1].tolist()) == "the man lives in paris, the man in paris"
    assert row.token_labels is None


def test_masks_fall_on_the_same_tokens_and_labels_are_what_stands_for_the_hidden_word(
    tmp_path: Path, bert: PreTrainedTokenizerFast, student: Path
) -> None:
    files = jsonl(tmp_path / "a.jsonl", [{"text": TEXT}] * 40)
    words = bert.get_vocab()
    expected = {words["girl"]: words["man"], words["rome"]: words["paris"]}
    options = {"objective": "mlm", "mask_probability": 0.5}
    seen = set()
    for plain, mapped in zip(rows(spec(files, **options), bert), rows(spec(files, **options, vocabulary=str(student)), bert), strict=True):
        assert plain.token_labels is not None
        assert mapped.token_labels is not None
        assert mapped.input_ids.dtype == plain.input_ids.dtype
        assert mapped.token_labels.dtype == plain.token_labels.dtype
        assert mapped.input_ids.tolist() == [expected.get(number, number) for number in plain.input_ids.tolist()]
        assert mapped.token_labels.tolist() == [expected.get(number, number) for number in plain.token_labels.tolist()]
        assert mapped.labelled == plain.labelled
        seen |= set(plain.token_labels.tolist())
    assert {IGNORED, *expected} <= seen


def test_classes_of_tokens_are_no_words(tmp_path: Path, bert: PreTrainedTokenizerFast, student: Path) -> None:
    names = [f"class {number}" for number in range(80)]
    number = bert.get_vocab()["girl"]
    files = jsonl(tmp_path / "a.jsonl", [{"text": "the girl", "label": [names[0], names[number]]}])
    options = {"label": {"column": "label", "classes": names, "tokens": True}, "vocabulary": str(student)}
    [row] = rows(spec(files, **options), bert)
    assert row.token_labels is not None
    assert row.token_labels.tolist() == [IGNORED, 0, number, IGNORED]


def test_the_building_fingerprint_is_of_the_map_and_not_of_its_place(tmp_path: Path, bert: PreTrainedTokenizerFast, student: Path) -> None:
    words = bert.get_vocab()
    same = written(tmp_path / "same", words, {words["girl"]: words["man"], words["rome"]: words["paris"]})
    other = written(tmp_path / "other", words, {words["girl"]: words["he"], words["rome"]: words["paris"]})
    of = {folder: building_fingerprint(spec("a.jsonl", vocabulary=str(folder))) for folder in (student, same, other)}
    assert of[student] == of[same]
    assert len({of[student], of[other], building_fingerprint(spec("a.jsonl"))}) == 3


def test_a_folder_without_a_map_and_a_map_of_fewer_words_are_refused(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    files = jsonl(tmp_path / "a.jsonl", [{"text": TEXT}])
    with pytest.raises(ValueError, match=r"rows.vocabulary: expected the folder of a student with .*, found no vocabulary"):
        rows(spec(files, vocabulary=str(tmp_path)), bert)
    few = written(tmp_path / "few", vocabulary("the"), {})
    with pytest.raises(ValueError, match=r"rows.vocabulary: .*few maps 58 words, and the tokenizer has \d+: give a student of its own"):
        rows(spec(files, vocabulary=str(few)), bert)
    assert np.array_equal(rows(spec(files), bert)[0].input_ids[:1], [bert.cls_token_id])
