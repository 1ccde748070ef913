"""Phrases are contiguous stretches of whole words inside one segment, or the ranges that a chunker found; goldens are by hand."""

import itertools
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import CanineTokenizer, PreTrainedTokenizerFast

from online.corpus import Record
from online.drafts import Draft
from online.examples import examples
from online.packing import documents
from online.phrases import Phrases, PhraseSpec, numbered
from online.rows import iter_groups
from online.rows_spec import RowsSpec
from store.rows import Row
from store.strict import parse

TEXTS = """the a man girl turned on faucet he him it was not nice lost play ##ed in rome don t well known u
    ' - . , ! ( ) 3 14"""
WORDS = TEXTS.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def _bert() -> PreTrainedTokenizerFast:
    """WordPiece with [CLS], [SEP] and segments."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    names = dict.fromkeys([*SPECIAL, *WORDS, *letters, *(f"##{letter}" for letter in letters)])
    inner = Tokenizer(models.WordPiece({word: number for number, word in enumerate(names)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    kinds = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **kinds)


def _gpt(trimmed: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE without special tokens around a text; where tokens lie, the space before a word may not count."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: number for number, letter in enumerate([*letters, "he", "Ġt", "Ġthe", "<|end|>"])}
    inner = Tokenizer(models.BPE(words, [("h", "e"), ("Ġ", "t"), ("Ġt", "he")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.ByteLevel(trim_offsets=trimmed)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", model_input_names=["input_ids"])


def _unigram(pre_tokenized: bool) -> PreTrainedTokenizerFast:
    """Pieces that mark white space, some of them nothing else; it may see a whole text as one word."""
    pieces = [("<unk>", 0.0), ("▁", -3.0), ("▁the", -1.0), ("he", -2.0), ("man", -2.0), (".", -3.0), (",", -3.0), ("</s>", 0.0)]
    inner = Tokenizer(models.Unigram(pieces, unk_id=0))
    if pre_tokenized:
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", model_input_names=["input_ids"])


TOKENIZERS = {"wordpiece": _bert(), "bytes": _gpt(), "trimmed": _gpt(True), "metaspace": _unigram(True), "one word": _unigram(False)}
BERT, GPT = TOKENIZERS["wordpiece"], TOKENIZERS["bytes"]


def rows(path: Path, records: list[dict[str, object]], tokenizer: PreTrainedTokenizerFast = BERT, **options: object) -> list[Row]:
    path.write_text("\n".join(json.dumps(record) for record in records))
    spec = parse(RowsSpec, {"sources": [{"files": str(path)}], **options}, "recipe")
    return [row for group in iter_groups(spec, tokenizer) for row in group]


def marked(tokenizer: PreTrainedTokenizerFast, row: Row) -> str:
    """The tokens of a row, with braces around each phrase."""
    assert row.phrases is not None
    pairs = zip(tokenizer.convert_ids_to_tokens(row.input_ids.tolist()), row.phrases.tolist(), strict=True)
    runs = [(number, " ".join(token for token, _ in run)) for number, run in itertools.groupby(pairs, key=lambda pair: pair[1])]
    assert [number for number, _ in runs if number] == list(range(1, int(row.phrases.max()) + 1))
    return " ".join(f"{{{text}}}" if number else text for number, text in runs)


# Words


@pytest.mark.parametrize(
    ("words", "text", "expected"),
    [
        (2, "The man turned on the faucet, not nice!", "{the man} {turned on} {the faucet} , {not nice} !"),
        (3, "The man turned on the faucet, not nice!", "{the man turned} {on the faucet} , {not nice} !"),
        (1, "He lost it", "{he} {lost} {it}"),
        (9, "He lost it. He was nice", "{he lost it} . {he was nice}"),
        (2, "He played in Rome", "{he play ##ed} {in rome}"),
        (2, "don't lost well-known 3.14 it", "{don ' t lost} {well - known 3 . 14} {it}"),
        (3, "he - him 'it' was, (nice) u. 3.", "{he} - {him} ' {it} ' {was} , ( {nice} ) {u} . {3} ."),
        (3, "the,man 3,14", "{the} , {man 3 , 14}"),
        (3, "the man\nlost him", "{the man} {lost him}"),
        (3, "the  man \t lost", "{the man lost}"),
        (2, "a [MASK] man ☃ it", "{a} [MASK] {man [UNK]} {it}"),
        (2, "the 男人 man", "{the [UNK]} {[UNK] man}"),
        (2, "...", ". . ."),
    ],
)
def test_phrases_are_stretches_of_whole_words(tmp_path: Path, words: int, text: str, expected: str) -> None:
    [row] = rows(tmp_path / "a.jsonl", [{"text": text}], phrases={"words": words})
    assert marked(BERT, row) == f"[CLS] {expected} [SEP]"
    assert row.phrases.dtype == np.uint16


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("bytes", "the  he's\n\nthe é<|end|>. the the the ", "{t he Ġ Ġ he ' s} Ċ Ċ {t he Ġ Ã ©} <|end|> . {Ġthe Ġthe} {Ġthe} Ġ"),
        ("trimmed", "the  he's\n\nthe é<|end|>. the the the ", "{t he Ġ Ġ he ' s} Ċ Ċ {t he Ġ Ã ©} <|end|> . {Ġthe Ġthe} {Ġthe} Ġ"),
        ("metaspace", "the man, man  the.</s> he", "{▁the ▁ man} , {▁ man ▁ ▁the} . </s> {▁ he}"),
        ("metaspace", "the the man the", "{▁the ▁the} {▁ man ▁the}"),
        ("one word", "the man, man  the. he", "{▁the ▁ man} , {▁ man ▁ ▁the} . {▁ he}"),
    ],
)
def test_white_space_that_is_a_token_goes_with_the_word_after_it(tmp_path: Path, name: str, text: str, expected: str) -> None:
    [row] = rows(tmp_path / "a.jsonl", [{"text": text}], TOKENIZERS[name], phrases={"words": 2})
    assert marked(TOKENIZERS[name], row) == expected


def test_a_phrase_stays_in_its_segment(tmp_path: Path) -> None:
    record = {"a": "the man", "b": "he lost", "c": "it was"}
    [row] = rows(tmp_path / "a.jsonl", [record], text=["{a}", "{b}", "{c}"], phrases={"words": 9})
    assert marked(BERT, row) == "[CLS] {the man} [SEP] {he lost} [SEP] {it was} [SEP]"
    [row] = rows(tmp_path / "a.jsonl", [{"a": "he ", "b": "he"}], GPT, text=["{a}", "{b}"], phrases={"words": 9})
    assert marked(GPT, row) == "{he} Ġ {he}"


def test_each_choice_has_phrases_of_its_own(tmp_path: Path) -> None:
    record = {"text": "the man", "one": "he lost it", "two": "not nice"}
    found = rows(tmp_path / "a.jsonl", [record], choices=["{one}", "{two}"], phrases={"words": 2})
    assert [marked(BERT, row) for row in found] == [
        "[CLS] {the man} [SEP] {he lost} {it} [SEP]",
        "[CLS] {the man} [SEP] {not nice} [SEP]",
    ]


@pytest.mark.parametrize(("length", "expected"), [(6, "{he play ##ed in}"), (5, "{he play ##ed}"), (4, "{he play}"), (3, "{he}")])
def test_a_row_that_is_cut_keeps_the_phrases_of_what_is_left(tmp_path: Path, length: int, expected: str) -> None:
    [row] = rows(tmp_path / "a.jsonl", [{"text": "he played in Rome, nice"}], max_length=length, phrases={"words": 4})
    assert marked(BERT, row) == f"[CLS] {expected} [SEP]"


def test_masks_change_no_phrase(tmp_path: Path) -> None:
    options = {"phrases": {"words": 2}, "mask_probability": 0.5}
    records = [{"text": f"he was not nice, the man {end}"} for end in ("lost him", "played", "turned on the faucet")]
    plain = rows(tmp_path / "a.jsonl", records, phrases={"words": 2})
    masked = rows(tmp_path / "a.jsonl", records, objective="mlm", copies=4, **options)
    assert len(masked) == 12
    for number, row in enumerate(masked):
        assert row.phrases.tolist() == plain[number % 3].phrases.tolist()
    assert any((row.input_ids == BERT.mask_token_id).any() for row in masked)


# Long documents


def test_a_document_that_is_cut_into_rows_numbers_its_phrases_anew(tmp_path: Path) -> None:
    found = rows(tmp_path / "a.jsonl", [{"text": "the man turned on, played"}], long="split", max_length=4, phrases={"words": 3})
    assert [marked(BERT, row) for row in found] == [
        "[CLS] {the man} [SEP]",
        "[CLS] {turned} {on} [SEP]",
        "[CLS] , {play} [SEP]",
        "[CLS] {##ed} [SEP]",
    ]


def test_packed_documents_share_no_phrase(tmp_path: Path) -> None:
    records = [{"text": "the man lost"}, {"text": "he was nice, it"}]
    found = rows(tmp_path / "a.jsonl", records, long="pack", max_length=10, phrases={"words": 2})
    assert [marked(BERT, row) for row in found] == ["[CLS] {the man} {lost} [SEP] [CLS] {he was} {nice} [SEP]", "[CLS] , {it} [SEP]"]
    packed = rows(tmp_path / "a.jsonl", [{"text": "he"}] * 3, GPT, long="pack", max_length=8, phrases={"words": 2})
    assert [row.phrases.tolist() for row in packed] == [[1, 2, 3]]
    causal = rows(tmp_path / "a.jsonl", [{"text": "he"}] * 3, GPT, long="pack", max_length=8, objective="causal", phrases={"words": 2})
    assert marked(GPT, causal[0]) == "{he} <|end|> {he} <|end|> {he} <|end|>"
    [alone] = rows(tmp_path / "a.jsonl", [{"text": "he he"}], GPT, objective="causal", phrases={"words": 2})
    assert marked(GPT, alone) == "{he Ġ he} <|end|>"


# What a chunker found


@pytest.mark.parametrize(
    ("template", "ranges", "expected"),
    [
        ("{text}", [[0, 2], [10, 17]], "{he} play ##ed {in rome} , nice"),
        ("{text}", [[3, 9], [9, 13]], "he {play ##ed} {in} rome , nice"),
        ("{text}", [[3, 5], [5, 9], [19, 23]], "he {play} {##ed} in rome , {nice}"),
        ("{text}", [[2, 4], [16, 19]], "he {play} ##ed in {rome ,} nice"),
        ("{text}", [[0, 1], [1, 2]], "{he} play ##ed in rome , nice"),
        ("{text}", [[2, 3]], "he play ##ed in rome , nice"),
        ("{text}", [], "he play ##ed in rome , nice"),
        ("not {text} it", [[0, 2], [10, 17]], "not {he} play ##ed {in rome} , nice it"),
    ],
)
def test_ranges_of_characters_are_phrases(tmp_path: Path, template: str, ranges: list[list[int]], expected: str) -> None:
    record = {"text": "He played in Rome, nice", "chunks": ranges}
    for options in ({"text": template}, {"text": ["a girl", template]}):
        [row] = rows(tmp_path / "a.jsonl", [record], phrases={"column": "chunks"}, **options)
        assert marked(BERT, row) == f"[CLS] {expected} [SEP]" if options["text"] == template else f"[CLS] a girl [SEP] {expected} [SEP]"
    [cut] = rows(
        tmp_path / "a.jsonl", [{"text": "He played in Rome", "chunks": [[3, 9], [13, 17]]}], max_length=4, phrases={"column": "chunks"}
    )
    assert marked(BERT, cut) == "[CLS] he {play} [SEP]"


def test_a_space_before_a_byte_level_token_is_no_part_of_its_phrase(tmp_path: Path) -> None:
    record = {"text": "he the the", "chunks": [[0, 3], [3, 6], [7, 10]]}
    [row] = rows(tmp_path / "a.jsonl", [record], GPT, phrases={"column": "chunks"})
    assert marked(GPT, row) == "{he} {Ġthe} {Ġthe}"
    found = rows(tmp_path / "a.jsonl", [record], GPT, long="split", max_length=2, text=" the {text}", phrases={"column": "chunks"})
    assert [marked(GPT, row) for row in found] == ["Ġthe Ġ", "{he} {Ġthe}", "{Ġthe}"]
    [row] = rows(
        tmp_path / "a.jsonl", [{"text": "he", "other": "the", "chunks": [[0, 2]]}], phrases={"column": "chunks"}, choices=["a", "the"]
    )[:1]
    assert marked(BERT, row) == "[CLS] {he} [SEP] a [SEP]"


@pytest.mark.parametrize(
    "chunks",
    [
        *(None, "0 2", {"start": 0}, [[0]], [[0, 2, 3]], [0, 2], [["0", "2"]], [[0, 2.5]], [[False, True]]),
        *([[2, 2]], [[3, 2]], [[-1, 2]], [[0, 8]], [[0, 3], [2, 5]], [[3, 5], [0, 2]]),
    ],
)
def test_what_is_no_list_of_ranges_is_refused_with_its_place(tmp_path: Path, chunks: object) -> None:
    for long in ("truncate", "split"):
        with pytest.raises(ValueError, match=r"a\.jsonl, record 1 \(counted from 0\): column 'chunks' holds .*; expected .*\[start, end\]"):
            rows(
                tmp_path / "a.jsonl",
                [{"text": "he", "chunks": []}, {"text": "he lost", "chunks": chunks}],
                phrases={"column": "chunks"},
                long=long,
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phrases": {}}, "phrases: expected one of words and column"),
        ({"phrases": {"words": 2, "column": "c"}}, "phrases: expected one of words and column"),
        ({"phrases": {"words": 0}}, "phrases.words: Input should be greater than or equal to 1"),
        ({"phrases": {"column": "c"}, "text": ["{a}", "{b}"]}, "phrases: column takes one text field that is used once, found a, b"),
        ({"phrases": {"column": "c"}, "text": "{a} {a}"}, "phrases: column takes one text field that is used once, found a, a"),
        (
            {"phrases": {"column": "c"}, "choices": ["{x}", "{y}"]},
            "phrases: column takes one text field that is used once, found text, x, y",
        ),
        ({"phrases": {"words": 2}, "max_length": 1 << 16}, "phrases: expected a max_length up to 65535"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(RowsSpec, {"sources": [{"files": "a.jsonl"}], **options}, "recipe")


def test_a_tokenizer_that_knows_no_places_is_refused() -> None:
    with pytest.raises(ValueError, match="phrases need a fast tokenizer"):
        Phrases(PhraseSpec(words=2), CanineTokenizer())


# What holds for every text


TEXT = st.text(alphabet=st.sampled_from("abthe  \n.,'-!()3é男☃"), min_size=1, max_size=60)


def check(numbers: np.ndarray, segments: list[int | None]) -> None:
    """Numbers ascend from 1, each in one stretch of tokens of one segment."""
    runs = [
        (number, [token for token, _ in run]) for number, run in itertools.groupby(enumerate(numbers.tolist()), key=lambda pair: pair[1])
    ]
    assert [number for number, _ in runs if number] == list(range(1, int(numbers.max(initial=0)) + 1))
    for number, tokens in runs:
        of = {segments[token] for token in tokens}
        assert not number or (len(of) == 1 and None not in of)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(TOKENIZERS)), TEXT, TEXT, st.integers(1, 4))
def test_phrases_are_contiguous_and_hold_no_more_than_so_many_words(name: str, one: str, other: str, words: int) -> None:
    tokenizer = TOKENIZERS[name]
    encoding = tokenizer([one], [other], return_offsets_mapping=True)
    numbers = Phrases(PhraseSpec(words=words), tokenizer)([one, other], encoding, 0, 0, [])
    segments, offsets = encoding.sequence_ids(0), encoding["offset_mapping"][0]
    check(numbers, segments)
    assert numbers.tolist() == numbered(numbers).tolist()
    for number in range(1, numbers.max(initial=0) + 1):
        tokens = np.flatnonzero(numbers == number)
        text = (one, other)[segments[tokens[0]]]
        start, end = offsets[tokens[0]][0], offsets[tokens[-1]][1]
        if all(len(text[slice(*offsets[token])].split()) < 2 for token in tokens):  # an unknown token may be of several words
            assert 1 <= len(text[start:end].split()) <= words
            assert "\n" not in text[start:end].strip()
        for token in tokens:  # punctuation inside a phrase joins what stands on both its sides
            first, after = offsets[token]
            if text[first:after].strip() and all(unicodedata.category(letter)[0] == "P" for letter in text[first:after].strip()):
                assert (text[first - 1] + text[after]).replace("_", "a").isalnum()
    for token, (segment, (first, after)) in enumerate(zip(segments, offsets, strict=True)):  # no word is left out
        piece = "" if segment is None else (one, other)[segment][first:after]
        assert (
            numbers[token] > 0
            or not any(letter.isalnum() for letter in piece)
            or encoding["input_ids"][0][token] in tokenizer.all_special_ids
        )


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text(alphabet="abthe", min_size=1, max_size=6), min_size=1, max_size=20),
    st.integers(1, 5),
    st.sampled_from(sorted(TOKENIZERS)),
)
def test_phrases_of_plain_words_are_cut_every_so_many_words(text: list[str], words: int, name: str) -> None:
    joined = " ".join(text)
    encoding = TOKENIZERS[name]([joined], return_offsets_mapping=True)
    numbers = Phrases(PhraseSpec(words=words), TOKENIZERS[name])([joined], encoding, 0, 0, [])
    found = []
    for number in range(1, numbers.max() + 1):
        places = [offset for offset, of in zip(encoding["offset_mapping"][0], numbers.tolist(), strict=True) if of == number]
        found.append(joined[places[0][0] : places[-1][1]].split())
    assert found == [text[start : start + words] for start in range(0, len(text), words)]


PAIR = parse(RowsSpec, {"sources": [{"files": "x"}], "text": ["{a}", "{b}"], "empty": "skip", "phrases": {"words": 2}}, "recipe")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), st.integers(5, 20), st.sampled_from(["truncate", "split", "pack"]))
def test_rows_of_any_shape_hold_sound_phrases(texts: list[tuple[str, str]], length: int, long: str) -> None:
    records = [Record(0, "x", number, number, "train", {"a": one, "b": other}) for number, (one, other) in enumerate(texts)]
    update = {"max_length": length, "long": long} | ({"text": ("{a}",)} if long != "truncate" else {})
    spec = PAIR.model_copy(update=update)
    drafts: list[Draft] = [draft for group in (examples if long == "truncate" else documents)(records, spec, BERT) for draft in group]
    for draft in drafts:
        segments = np.zeros(len(draft.ids), int) if draft.segments is None else draft.segments
        parts = np.zeros(len(draft.ids), int) if draft.documents is None else draft.documents
        assert draft.phrases is not None
        check(draft.phrases, [None if added else of for added, of in zip(draft.added, zip(segments, parts, strict=True), strict=True)])
