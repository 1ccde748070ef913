"""Texts and options of which no rows can be made are refused with their place; what the building fingerprint covers."""

from pathlib import Path

import pytest
from text_rows import jsonl, rows, spec, tokens
from transformers import PreTrainedTokenizerFast

from online.rows_spec import building_fingerprint


@pytest.mark.parametrize("long", ["truncate", "split", "pack"])
@pytest.mark.parametrize("text", ["", " \n\t", "\u0000\u0007", None])
def test_an_empty_text_is_refused_with_its_place_or_skipped(
    tmp_path: Path, bert: PreTrainedTokenizerFast, long: str, text: str | None
) -> None:
    files = jsonl(tmp_path / "a.jsonl", [{"text": "man"}, {"text": text}, {"text": "girl"}])
    with pytest.raises(ValueError, match=r"a\.jsonl, record 1 \(counted from 0\): empty text; set rows\.empty=skip"):
        rows(spec(files, long=long), bert)
    found = rows(spec(files, long=long, empty="skip"), bert)
    assert [tokens(bert, row) for row in found] == (
        ["[CLS] man [SEP] [CLS] girl [SEP]"] if long == "pack" else ["[CLS] man [SEP]", "[CLS] girl [SEP]"]
    )


def test_a_segment_is_empty_when_all_its_fields_are(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    files = jsonl(tmp_path / "a.jsonl", [{"a": "man", "b": " "}])
    assert len(rows(spec(files, text="{a} {b}"), bert)) == 1
    for text in (["{a}", "{b}"], ["said {b}"]):
        with pytest.raises(ValueError, match="empty text"):
            rows(spec(files, text=text), bert)


def test_a_field_that_is_no_text_is_refused(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"record 0 .*: column 'text' holds a list; expected text"):
        rows(spec(jsonl(tmp_path / "a.jsonl", [{"text": ["man"]}]), text="{text}"), bert)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "no field"}, "text: expected a column name between braces"),
        ({"text": "{a"}, "expected '}' before end of string; write {{ and }} for braces"),
        ({"text": "{a!r}"}, "expected a column name between braces, found 'a'"),
        ({"text": ["{a}", "{b}"], "long": "split"}, "long: split takes one text template"),
        ({"label": {"column": "y", "score": True}, "long": "pack"}, "long: pack takes one text template"),
        ({"text": ["{a}", "{b}"], "objective": "causal"}, "objective: causal takes one text template"),
        ({"copies": 2}, "copies: only objective mlm"),
        ({"choices": ["{a}"]}, "choices: expected two or more"),
        ({"choices": ["{a}", "{b}"], "group": "id"}, "group: the choices of a record already are a group"),
        ({"choices": ["{a}", "{b}"], "label": {"column": "y", "classes": [1, 2, 3]}}, "label: expected 2 classes"),
        ({"choices": ["{a}", "{b}"], "label": {"column": "y", "score": True}}, "neither score nor tokens"),
        ({"spans": [{"field": "word", "start": "i", "end": "j"}]}, "spans: no text template uses the field 'word'"),
        ({"spans": [{"field": "text", "start": "i"}]}, "a span needs either end or text"),
        ({"label": {"column": "y"}}, "label: expected classes or score"),
        ({"label": {"column": "y", "classes": ["a", "b", "a"]}}, "a class is given twice"),
        ({"label": {"column": "y", "classes": [True, False]}}, "put quotes around classes"),
        ({"label": {"column": "y", "classes": ["a"], "score": True}}, "a score has neither classes nor tokens"),
        ({"label": {"column": "y", "classes": ["a"], "tokens": True}, "objective": "mlm"}, "label: tokens takes objective plain"),
        ({"label": {"column": "y", "classes": ["a"], "tokens": True}, "text": "x {a}"}, "single field"),
        ({"label": {"column": "y", "tokens": True}}, "tokens needs classes"),
        ({"slot_tokens": 1000}, "multiple of 128"),
        ({"max_lenght": 3}, "unknown key 'max_lenght'; did you mean 'max_length'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=r"recipe: ") as error:
        spec("a.jsonl", **options)
    assert message in str(error.value)


def test_the_building_fingerprint_covers_options_and_not_the_place_of_the_corpus() -> None:
    plain = building_fingerprint(spec("a.jsonl"))
    assert plain == building_fingerprint(spec("b/*.parquet"))
    changes: list[dict[str, object]] = [{"max_length": 64}, {"seed": 1}, {"text": "{body}"}, {"hold_out": 0.1}, {"slot_tokens": 1024}]
    assert len({plain, *(building_fingerprint(spec("a.jsonl", **change)) for change in changes)}) == 6
