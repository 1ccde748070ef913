"""Text becomes the same rows every time, with everything that teachers and metrics need."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from online.batch import IGNORED
from online.rows import RowsSpec, building_fingerprint, corpus_fingerprint, iter_groups
from store.rows import Row
from store.strict import parse

WORDS = """the a man girl turned on faucet water flowed from toilet filled class temper real professional emerging lost he him it was
    not nice ! . , ? bernard who old said rome paris lives in city play ##ing ##ed"""


def vocabulary(*words: str) -> dict[str, int]:
    """Distinct ids: two WordPiece tokens with one id break silently when saved and loaded."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    found = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters, *(f"##{letter}" for letter in letters)])
    return {word: number for number, word in enumerate(found)}


@pytest.fixture(scope="module")
def bert() -> PreTrainedTokenizerFast:
    """WordPiece with [CLS], [SEP] and segments."""
    words = vocabulary(*WORDS.split())
    inner = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = [(name, words[name]) for name in ("[CLS]", "[SEP]")]
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=specials
    )
    inner.decoder = decoders.WordPiece()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names)


@pytest.fixture(scope="module")
def gpt() -> PreTrainedTokenizerFast:
    """Byte-level BPE without special tokens around a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: number for number, letter in enumerate([*letters, "he", "Ġt", "Ġthe", "<|end|>"])}
    inner = Tokenizer(models.BPE(words, [("h", "e"), ("Ġ", "t"), ("Ġt", "he")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", bos_token="<|end|>", model_input_names=["input_ids"])


def jsonl(path: Path, rows: Iterable[dict[str, object]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def spec(files: str, **options: object) -> RowsSpec:
    return parse(RowsSpec, {"sources": [{"files": files}], **options}, "recipe")


def rows(spec: RowsSpec, tokenizer: PreTrainedTokenizerFast, read_rows: int = 1024) -> list[Row]:
    return [row for group in iter_groups(spec, tokenizer, read_rows=read_rows) for row in group]


def tokens(tokenizer: PreTrainedTokenizerFast, row: Row) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(row.input_ids.tolist()))


def marked(tokenizer: PreTrainedTokenizerFast, row: Row) -> list[str]:
    """The text under each span."""
    return [tokenizer.decode(row.input_ids[start:end].tolist()) for start, end in row.spans]


def same(left: list[Row], right: list[Row], but: tuple[str, ...] = ()) -> bool:
    return len(left) == len(right) and all(
        np.array_equal(getattr(a, name), getattr(b, name)) if isinstance(value, np.ndarray) else value == getattr(b, name)
        for a, b in zip(left, right, strict=True)
        for name, value in vars(a).items()
        if name not in but
    )


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
WIC_SPANS = [{"field": "sentence1", "start": "start1", "end": "end1"}, {"field": "sentence2", "start": "start2", "end": "end2"}]


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


# Length


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


# Masks


def test_masked_rows_keep_their_originals_as_labels_and_never_hide_special_tokens(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    files = jsonl(tmp_path / "a.jsonl", [{"a": "the man turned on the water " * (n % 4 + 1), "b": "nice ☕ city"} for n in range(200)])
    plain, masked = (rows(spec(files, text=["{a}", "{b}"], objective=objective), bert) for objective in ("plain", "mlm"))
    chosen = total = 0
    for before, after in zip(plain, masked, strict=True):
        assert after.token_labels is not None
        labelled = after.token_labels != IGNORED
        assert labelled.sum() == after.labelled >= 1
        np.testing.assert_array_equal(np.where(labelled, after.token_labels, after.input_ids), before.input_ids)
        special = np.isin(before.input_ids, bert.all_special_ids)
        assert not (special & labelled).any()
        assert not np.isin(after.input_ids[labelled], [bert.cls_token_id, bert.sep_token_id, bert.pad_token_id, bert.unk_token_id]).any()
        chosen, total = chosen + after.labelled, total + int((~special).sum())
    forced = sum((1 - 0.15) ** int((~np.isin(row.input_ids, bert.all_special_ids)).sum()) for row in plain)
    assert abs(chosen - forced - 0.15 * total) < 4 * np.sqrt(0.15 * 0.85 * total)


def test_a_text_of_unknown_words_alone_still_has_one_to_predict(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    [row] = rows(spec(jsonl(tmp_path / "a.jsonl", [{"text": "☕"}]), objective="mlm"), bert)
    assert row.token_labels is not None
    assert row.token_labels.tolist() == [IGNORED, bert.unk_token_id, IGNORED]


def test_copies_are_further_maskings_of_all_texts(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    train = jsonl(tmp_path / "train.jsonl", [{"text": f"the man turned on the water {letter} in the city"} for letter in "abcdef"])
    sources = [{"files": train}, {"files": jsonl(tmp_path / "dev.jsonl", [{"text": "the man said it was nice"}]), "split": "dev"}]
    found = rows(parse(RowsSpec, {"sources": sources, "objective": "mlm", "copies": 3}, "recipe"), bert)
    records = [*(("train", n) for n in range(6)), ("dev", 0)]
    assert [(row.copy, row.split, row.record) for row in found] == [(copy, *record) for copy in range(3) for record in records]
    assert [row.group for row in found] == list(range(21))
    by_record = {n: [row for row in found if (row.record, row.split) == (n, "train")] for n in range(6)}
    different = [len({row.input_ids.tobytes() + row.token_labels.tobytes() for row in copies}) for copies in by_record.values()]  # type: ignore[union-attr]
    assert np.mean(different) > 2.5
    originals = [
        {np.where(row.token_labels == IGNORED, row.input_ids, row.token_labels).tobytes() for row in copies}
        for copies in by_record.values()
    ]
    assert all(len(texts) == 1 for texts in originals)


def test_masks_do_not_depend_on_files_batches_or_what_else_is_built(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    texts = [{"text": f"the man turned on the water {'abcdef'[n % 6]}"} for n in range(30)]
    jsonl(tmp_path / "one" / "a.jsonl", texts)
    jsonl(tmp_path / "many" / "a.jsonl", texts[:7])
    jsonl(tmp_path / "many" / "b.jsonl", texts[7:8])
    jsonl(tmp_path / "many" / "c.jsonl", texts[8:])
    one, many = (spec(str(tmp_path / name), objective="mlm", copies=2) for name in ("one", "many"))
    assert same(rows(one, bert), rows(many, bert, read_rows=3), but=("source", "record"))
    assert corpus_fingerprint(one) == corpus_fingerprint(many)
    assert building_fingerprint(one) == building_fingerprint(many)
    assert same(rows(one, bert)[:30], rows(spec(str(tmp_path / "one"), objective="mlm"), bert))
    assert not same(rows(one, bert), rows(spec(str(tmp_path / "one"), objective="mlm", copies=2, seed=1), bert))


def test_a_tokenizer_without_mask_token_cannot_mask(tmp_path: Path, gpt: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="objective mlm needs a mask token"):
        rows(spec(jsonl(tmp_path / "a.jsonl", [{"text": "man"}]), objective="mlm"), gpt)


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


# Bad data and options


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


# Real data


@pytest.fixture(scope="module")
def real(shared: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(shared / "teachers" / "mlm")


def task(shared: Path, name: str, limit: int = 200, **options: object) -> RowsSpec:
    return parse(
        RowsSpec, {"sources": [{"files": str(shared / "data" / "tasks" / f"{name}.parquet"), "limit": limit}], **options}, "recipe"
    )


def test_the_marked_words_of_real_wic_are_found(shared: Path, real: PreTrainedTokenizerFast) -> None:
    label = {"column": "label", "classes": ["different_sense", "same_sense"]}
    found = rows(task(shared, "wic_dev", text=["{sentence1}", "{sentence2}"], label=label, spans=WIC_SPANS), real)
    words = [marked(real, row) for row in found]
    assert words[0] == ["class", "class"]
    assert len(found) == 200
    assert all(first[:2] == second[:2] for first, second in words[:5])
    assert all(0 < row.spans[0][0] < row.spans[0][1] < row.spans[1][0] < row.spans[1][1] for row in found)


def test_the_marked_words_of_real_wsc_are_found(shared: Path, real: PreTrainedTokenizerFast) -> None:
    spans = [{"field": "sentence1", "start": f"span{n}_index", "text": f"span{n}_text", "unit": "words"} for n in (1, 2)]
    label = {"column": "label", "classes": ["not_coreferent", "coreferent"]}
    found = rows(task(shared, "wsc_dev", text="{sentence1}", label=label, spans=spans), real)
    assert [marked(real, row) for row in found[:2]] == [["anyone", "him"], ["mr. moncrieff", "his"]]
    assert len(found) == 104


def test_real_copa_and_stsb_fit(shared: Path, real: PreTrainedTokenizerFast) -> None:
    copa = task(shared, "copa_dev", text=["{sentence1}", "{question}"], choices=["{choice1}", "{choice2}"], label={"column": "label"})
    groups = list(iter_groups(copa, real))
    assert len(groups) == 100
    assert all(sorted(row.label or 0.0 for row in group) == [0.0, 1.0] for group in groups)
    scores = rows(task(shared, "stsb_dev", text=["{sentence1}", "{sentence2}"], label={"column": "label", "score": True}), real)
    assert [row.label for row in scores[:2]] == [5.0, 4.75]
