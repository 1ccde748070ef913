"""Text becomes the same rows every time, with everything that teachers and metrics need."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from text_rows import WIC_SPANS, jsonl, marked, rows, same, spec, tokens
from transformers import PreTrainedTokenizerFast

from online.batch import IGNORED
from online.rows import iter_groups
from online.rows_spec import RowsSpec
from store.strict import parse

# Segments and labels


def test_a_pair_is_two_segments_with_its_class(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    files = jsonl(tmp_path / "a.jsonl", [{"a": "The man", "b": "the girl.", "label": "no"}, {"a": "He", "b": "played", "label": "yes"}])
    found = rows(spec(files, text=["{a}", "{b}"], label={"column": "label", "classes": ["yes", "no"]}), bert)
    assert [tokens(bert, row) for row in found] == ["[CLS] the man [SEP] the girl . [SEP]", "[CLS] he [SEP] play ##ed [SEP]"]
    assert [None if row.segments is None else row.segments.tolist() for row in found] == [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert [row.label for row in found] == [1.0, 0.0]
    assert [(row.source, row.record, row.part, row.group, row.split) for row in found] == [(files, n, 0, n, "train") for n in (0, 1)]
    assert all(row.token_labels is None and row.labelled == 0 for row in found)


def test_a_single_text_has_no_segments_and_a_template_keeps_its_words(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    files = jsonl(tmp_path / "a.jsonl", [{"text": "Rome", "n": 3, "section": ""}])
    [row] = rows(spec(files, text="{section} {text} was nice {{{n}}}"), bert)
    assert row.segments is None
    assert tokens(bert, row) == "[CLS] rome was nice [UNK] [UNK] [UNK] [SEP]"


def test_the_third_text_follows_the_second_behind_a_separator(
    tmp_path: Path, bert: PreTrainedTokenizerFast, gpt: PreTrainedTokenizerFast
) -> None:
    files = jsonl(tmp_path / "a.jsonl", [{"a": "man", "b": "girl", "c": "water"}])
    three = spec(files, text=["{a}", "{b}", "{c}"])
    [row] = rows(three, bert)
    assert tokens(bert, row) == "[CLS] man [SEP] girl [SEP] water [SEP]"
    assert row.segments is not None
    assert row.segments.tolist() == [0, 0, 0, 1, 1, 1, 1]
    [row] = rows(three, gpt)
    assert gpt.decode(row.input_ids.tolist()) == "mangirl<|end|>water"
    assert row.segments is None


@pytest.mark.parametrize(
    ("classes", "values", "expected"),
    [
        (["no", "yes"], ["yes", "no"], [1, 0]),
        (["no", "yes"], [1, 0], [1, 0]),
        (["no", "yes"], [True, False], [1, 0]),
        (["no", "yes"], ["1", 0.0], [1, 0]),
        ([-1, 1], [1, -1], [1, 0]),
        ([1, 0], ["1", "0"], [0, 1]),
        (["1", "0"], [1, "0"], [0, 1]),
    ],
)
def test_labels_are_positions_in_the_classes(
    tmp_path: Path, bert: PreTrainedTokenizerFast, classes: list[object], values: list[object], expected: list[int]
) -> None:
    files = jsonl(tmp_path / "a.jsonl", [{"text": "man", "label": value} for value in values])
    assert [row.label for row in rows(spec(files, label={"column": "label", "classes": classes}), bert)] == expected


@pytest.mark.parametrize("value", ["maybe", 2, -1, 0.5, None, ["yes"]])
def test_a_label_outside_the_classes_is_refused_with_its_place(tmp_path: Path, bert: PreTrainedTokenizerFast, value: object) -> None:
    files = jsonl(tmp_path / "a.jsonl", [{"text": "man", "label": "yes"}, {"text": "girl", "label": value}])
    with pytest.raises(
        ValueError, match=r"a\.jsonl, record 1 \(counted from 0\): column 'label' holds the label .*; expected one of no, yes"
    ):
        rows(spec(files, label={"column": "label", "classes": ["no", "yes"]}), bert)


def test_scores_are_numbers_and_nothing_else(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    score = {"column": "label", "score": True}
    files = jsonl(tmp_path / "a.jsonl", [{"text": "man", "label": 4}, {"text": "girl", "label": 0.25}, {"text": "he", "label": "3.5"}])
    found = spec(files, label=score)
    assert [row.label for row in rows(found, bert)] == [4.0, 0.25, 3.5]
    assert found.task.kind == "regression"
    for value in ("high", None, float("nan")):
        with pytest.raises(ValueError, match="expected a finite number"):
            rows(spec(jsonl(tmp_path / "b.jsonl", [{"text": "man", "label": value}]), label=score), bert)


def test_each_word_is_labelled_at_its_first_token(tmp_path: Path, bert: PreTrainedTokenizerFast, gpt: PreTrainedTokenizerFast) -> None:
    label = {"column": "tags", "classes": ["O", "LOC"], "tokens": True}
    files = jsonl(tmp_path / "a.jsonl", [{"words": ["He", "played", "in", "Rome", "!"], "tags": ["O", "O", "O", "LOC", 0]}])
    tagged = spec(files, text="{words}", label=label)
    [row] = rows(tagged, bert)
    assert tokens(bert, row) == "[CLS] he play ##ed in rome ! [SEP]"
    assert row.token_labels is not None
    assert row.token_labels.tolist() == [IGNORED, 0, 0, IGNORED, 0, 1, 0, IGNORED]
    assert (row.labelled, row.label) == (5, None)
    [row] = rows(tagged, gpt)
    assert row.token_labels is not None
    firsts = np.flatnonzero(row.token_labels != IGNORED)
    assert [gpt.decode(row.input_ids[start:].tolist())[:2].strip()[0] for start in firsts] == ["H", "p", "i", "R", "!"]
    [cut] = rows(spec(files, text="{words}", label=label, max_length=5), bert)
    assert cut.labelled == 2
    csv = tmp_path / "a.csv"
    csv.write_text("words,tags\nHe played in Rome !,O O O LOC 0\n")
    assert same(rows(tagged, bert), rows(spec(str(csv), text="{words}", label=label), bert), but=("source",))
    short = jsonl(tmp_path / "b.jsonl", [{"words": ["He", "played"], "tags": ["O"]}])
    with pytest.raises(ValueError, match=r"record 0 .*: 2 words in column 'words', 1 labels in 'tags'"):
        rows(spec(short, text="{words}", label=label), bert)


# Groups, choices, spans


def test_choices_are_a_group_with_the_right_one_marked(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    """COPA."""
    copa = {"premise": "The man turned on the faucet.", "choice1": "The toilet filled", "choice2": "water flowed", "question": "effect"}
    files = jsonl(tmp_path / "a.jsonl", [{**copa, "label": 1}, {**copa, "label": 0}])
    found = spec(files, text="{premise}", choices=["{choice1}", "{choice2}"], label={"column": "label"})
    groups = list(iter_groups(found, bert))
    assert [tokens(bert, row) for row in groups[0]] == [
        "[CLS] the man turned on the faucet . [SEP] the toilet filled [SEP]",
        "[CLS] the man turned on the faucet . [SEP] water flowed [SEP]",
    ]
    assert [[row.label for row in group] for group in groups] == [[0.0, 1.0], [1.0, 0.0]]
    assert [[row.group for row in group] for group in groups] == [[0, 0], [1, 1]]
    assert [row.part for row in groups[0]] == [0, 1]
    assert (found.task.kind, found.task.choices) == ("choice", 2)
    assert {row.label for row in rows(spec(files, text="{premise}", choices=["{choice1}", "{choice2}"]), bert)} == {None}


def test_answers_to_one_question_are_a_group(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    """MultiRC: paragraph, question and answer, grouped by question."""
    answers = [
        ("p0q0", "rome", 1),
        ("p0q0", "paris", 0),
        ("p0q1", "rome", 0),
        ("p1q0", "water", 1),
        ("p1q0", "a man", 0),
        ("p1q0", "he", 1),
    ]
    files = [
        jsonl(tmp_path / f"{number}.jsonl", [{"p": "He lives in Rome", "q": "in city?", "a": a, "id": i, "label": y} for i, a, y in part])
        for number, part in enumerate((answers[:1], answers[1:]))
    ]
    found = parse(
        RowsSpec,
        {
            "sources": [{"files": files}],
            "text": ["{p}", "{q}", "{a}"],
            "group": "id",
            "label": {"column": "label", "classes": ["wrong", "right"]},
        },
        "recipe",
    )
    groups = list(iter_groups(found, bert, read_rows=2))
    assert [len(group) for group in groups] == [2, 1, 3]
    assert [[row.group for row in group] for group in groups] == [[0, 0], [1], [2, 2, 2]]
    assert [[row.label for row in group] for group in groups] == [[1, 0], [0], [1, 0, 1]]
    assert tokens(bert, groups[0][1]) == "[CLS] he lives in rome [SEP] in city ? [SEP] paris [SEP]"


def test_a_group_ends_with_its_source(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    sources = [{"files": jsonl(tmp_path / f"{n}.jsonl", [{"text": "man", "id": 7}] * 2)} for n in range(2)]
    assert [len(group) for group in iter_groups(parse(RowsSpec, {"sources": sources, "group": "id"}, ""), bert)] == [2, 2]


WIC = {"sentence1": "An emerging professional class.", "sentence2": "Lost temper was real class.", "word": "class", "label": 0}


def test_character_spans_become_token_spans_of_their_segment(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    """WiC; also behind words of a template, and in a joined second segment."""
    files = jsonl(tmp_path / "a.jsonl", [{**WIC, "start1": 25, "end1": 30, "start2": 21, "end2": 26}])
    for text in (["{sentence1}", "{sentence2}"], ["he said {sentence1}", "{word}", "a {sentence2}"], ["{sentence2} it {sentence1}"]):
        [row] = rows(spec(files, text=text, spans=WIC_SPANS), bert)
        assert marked(bert, row) == ["class", "class"]
        assert len(set(row.spans)) == 2
    with pytest.raises(ValueError, match=r"record 0 .*: a span lies beyond max_length 10; raise it"):
        rows(spec(files, text=["{sentence1}", "{sentence2}"], spans=WIC_SPANS, max_length=10), bert)


def test_word_spans_end_where_the_marked_text_ends(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    """WSC: index of the first word, and the span's text."""
    record = {"text": "Bernard , who was old  said the old city lives in him .", "i": 6, "s": "the old city", "j": 11, "t": "him"}
    spans = [{"field": "text", "start": "i", "text": "s", "unit": "words"}, {"field": "text", "start": "j", "text": "t", "unit": "words"}]
    [row] = rows(spec(jsonl(tmp_path / "a.jsonl", [record]), spans=spans), bert)
    assert marked(bert, row) == ["the old city", "him"]
    for wrong in ({"i": 40}, {"i": -1}, {"s": ""}, {"i": "first"}):
        with pytest.raises(ValueError, match=r"a\.jsonl, record 0 .*(span .* leaves the text of 13 words|expected a whole number)"):
            rows(spec(jsonl(tmp_path / "a.jsonl", [{**record, **wrong}]), spans=spans), bert)


# Held-out rows


def test_held_out_records_are_a_fixed_share_and_groups_stay_whole(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    files = jsonl(tmp_path / "a.jsonl", [{"text": "man", "id": n // 4} for n in range(2000)])
    alone, grouped = spec(files, hold_out=0.2), spec(files, hold_out=0.2, group="id")
    splits = [row.split for row in rows(alone, bert)]
    assert splits == [row.split for row in rows(alone, bert, read_rows=7)]
    assert stats.binomtest(splits.count("dev"), 2000, 0.2).pvalue > 1e-3
    groups = [{row.split for row in group} for group in iter_groups(grouped, bert)]
    assert len(groups) == 500
    assert all(len(group) == 1 for group in groups)
    assert stats.binomtest(sum(group == {"dev"} for group in groups), 500, 0.2).pvalue > 1e-3
    assert {row.split for row in rows(parse(RowsSpec, {"sources": [{"files": files, "split": "test"}], "hold_out": 0.5}, ""), bert)} == {
        "test"
    }
