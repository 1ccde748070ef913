"""Clozes: a template's masked word stands for the label, and the template survives every cut."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from online.batch import IGNORED
from online.cloze_rows import ClozeSpec, verbalisers
from online.collate import collate
from online.rows import build_rows, iter_groups
from online.rows_spec import RowsSpec, building_fingerprint
from store.manifest import Provenance
from store.reader import Store
from store.rows import Row
from store.strict import parse

WORDS = ["a", "film", "it", "was", "great", "bad", "dull", "no", "yes", "question", "?", ".", ",", "##ter", "##rible"]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MADE = Provenance(command=("tests",), versions={}, created="2026-01-01T00:00:00Z")


def bert() -> PreTrainedTokenizerFast:
    """WordPiece with [CLS], [SEP] and segments."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    found = dict.fromkeys([*SPECIAL, *WORDS, *letters, *(f"##{letter}" for letter in letters)])
    inner = Tokenizer(models.WordPiece({word: number for number, word in enumerate(found)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names)


def roberta() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose mask takes the space in front of it, and that knows " it"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = {
        piece: number for number, piece in enumerate(["<s>", "</s>", "<mask>", "<unk>", *alphabet, "it", "Ġit", "no", "Ġno", "Ġt", "Ġti"])
    }
    inner = Tokenizer(models.BPE(numbers, [("i", "t"), ("Ġ", "it"), ("n", "o"), ("Ġ", "no"), ("Ġ", "t"), ("Ġt", "i")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    inner.decoder = decoders.ByteLevel()
    names = {"mask_token": AddedToken("<mask>", lstrip=True), "unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def spec(folder: Path, records: list[dict[str, Any]], **options: Any) -> RowsSpec:  # noqa: ANN401
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, records)))
    rows = {
        "sources": [{"files": str(folder / "text.jsonl")}],
        "text": "{text} It was {mask}.",
        "label": {"column": "label", "classes": ["negative", "positive"]},
        "cloze": {"words": ["bad", "great"]},
        "objective": "mlm",
    }
    return parse(RowsSpec, {name: value for name, value in (rows | options).items() if value is not None}, "rows")


def build(made: RowsSpec, tokenizer: PreTrainedTokenizerFast) -> list[Row]:
    return [row for group in iter_groups(made, tokenizer) for row in group]


def shown(row: Row, tokenizer: PreTrainedTokenizerFast) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(row.input_ids.tolist()))


def answer(row: Row, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """The token that is labelled, and with which word; the only one."""
    assert row.token_labels is not None
    (place,) = np.flatnonzero(row.token_labels != IGNORED)
    assert row.labelled == 1
    return tuple(tokenizer.convert_ids_to_tokens([int(row.input_ids[place]), int(row.token_labels[place])]))


def test_the_masked_word_of_a_template_is_that_of_the_rows_class(tmp_path: Path) -> None:
    tokenizer = bert()
    rows = build(spec(tmp_path, [{"text": "A film", "label": "positive"}, {"text": "dull, dull", "label": 0}]), tokenizer)
    assert [shown(row, tokenizer) for row in rows] == [
        "[CLS] a film it was [MASK] . [SEP]",
        "[CLS] dull , dull it was [MASK] . [SEP]",
    ]
    assert [answer(row, tokenizer) for row in rows] == [("[MASK]", "great"), ("[MASK]", "bad")]
    assert [row.label for row in rows] == [1.0, 0.0]


def test_a_mask_in_the_text_itself_is_not_the_one_that_is_asked_for(tmp_path: Path) -> None:
    tokenizer = bert()
    (row,) = build(spec(tmp_path, [{"text": "a [MASK] film", "label": 1}]), tokenizer)
    assert shown(row, tokenizer) == "[CLS] a [MASK] film it was [MASK] . [SEP]"
    assert row.token_labels is not None
    assert np.flatnonzero(row.token_labels != IGNORED).tolist() == [6]


def test_a_cut_takes_the_ends_of_the_longest_fields_and_leaves_the_template(tmp_path: Path) -> None:
    tokenizer = bert()
    record = {"text": "a b c d e f", "other": "x y z", "label": 1}
    two = {"text": ["{mask}, {text}?", "question {other} it was"]}
    lengths = {18: ("a b c d e f", "x y z"), 17: ("a b c d e", "x y z"), 14: ("a b c", "x y"), 11: ("a", "x")}
    for length, (text, other) in lengths.items():
        (row,) = build(spec(tmp_path, [record], **two, max_length=length), tokenizer)
        assert shown(row, tokenizer) == f"[CLS] [MASK] , {text} ? [SEP] question {other} it was [SEP]", length
        assert answer(row, tokenizer) == ("[MASK]", "great")
        assert row.segments is not None
        assert row.segments.tolist() == [0] * (5 + len(text.split())) + [1] * (4 + len(other.split()))
    with pytest.raises(ValueError, match="max_length 9 leaves no room for text beside the template; expected at least 10"):
        build(spec(tmp_path, [record], **two, max_length=9), tokenizer)


def test_a_mask_that_takes_the_space_in_front_of_it_is_found(tmp_path: Path) -> None:
    tokenizer = roberta()
    words = {"cloze": {"words": ["no", " it"]}}
    records = [{"text": "it it it it", "label": 1}]
    for length, left in ((32, "it Ġit Ġit Ġit"), (9, "it Ġit")):
        (row,) = build(spec(tmp_path, records, **words, text="{text} no <{mask}!", max_length=length), tokenizer)
        assert shown(row, tokenizer) == f"<s> {left} Ġno Ġ < <mask> ! </s>"
        assert answer(row, tokenizer) == ("<mask>", "Ġit")


def test_words_that_one_mask_cannot_hold_are_refused_with_their_pieces() -> None:
    with pytest.raises(ValueError, match="'terrible' is 't', '##e', '##r', '##rible'"):
        verbalisers(ClozeSpec(words=("great", "terrible")), bert())
    with pytest.raises(ValueError, match="the tokenizer does not know 'ß'"):
        verbalisers(ClozeSpec(words=("great", "ß")), bert())
    with pytest.raises(ValueError, match="'GREAT' and 'great' are one token"):
        verbalisers(ClozeSpec(words=("great", "GREAT")), bert())
    with pytest.raises(ValueError, match="write it with the space in front of it: ' ti'"):
        verbalisers(ClozeSpec(words=("no", "ti")), roberta())
    assert verbalisers(ClozeSpec(words=(" it", "no")), roberta()) == tuple(roberta().convert_tokens_to_ids(["Ġit", "no"]))
    assert verbalisers(ClozeSpec(words=("bad", "great")), bert()) == tuple(bert().convert_tokens_to_ids(["bad", "great"]))


def test_a_store_knows_the_words_of_its_classes_and_batches_carry_them(tmp_path: Path) -> None:
    tokenizer = bert()
    made = spec(tmp_path, [{"text": "a film", "label": 1}, {"text": "dull", "label": 0}, {"text": "no", "label": 0}])
    rows = build_rows(made, tokenizer, tmp_path / "store", MADE)
    expected = tokenizer.convert_tokens_to_ids(["bad", "great"])
    assert rows.verbalisers == tuple(expected)
    assert rows.task.classes == ("negative", "positive")
    batch = collate(Store.open(tmp_path / "store"), np.array([2, 0]))
    assert batch.verbalisers is not None
    assert batch.verbalisers.tolist() == expected
    assert batch.labelled.sum(1).tolist() == [1, 1]
    assert batch.token_labels is not None
    assert batch.token_labels[batch.labelled].tolist() == expected
    plain = build_rows(spec(tmp_path, [{"text": "a", "label": 1}], cloze=None, text="{text}"), tokenizer, tmp_path / "plain", MADE)
    assert plain.verbalisers == ()
    assert collate(Store.open(tmp_path / "plain"), np.array([0])).verbalisers is None


def test_empty_texts_are_refused_or_left_out_although_the_template_is_not_empty(tmp_path: Path) -> None:
    records = [{"text": " ", "label": 1}, {"text": "a", "label": 1}, {"text": "\x00", "label": 1}]
    with pytest.raises(ValueError, match=r"record 0 .*empty text"):
        build(spec(tmp_path, records), bert())
    assert [shown(row, bert()) for row in build(spec(tmp_path, records, empty="skip"), bert())] == ["[CLS] a it was [MASK] . [SEP]"]


def test_rows_without_a_cloze_are_fingerprinted_as_they_were(tmp_path: Path) -> None:
    one = spec(tmp_path, [], cloze=None, text="{text}")
    assert building_fingerprint(one) == building_fingerprint(one.model_copy(update={"cloze": None}))
    assert building_fingerprint(one) != building_fingerprint(spec(tmp_path, []))
    other = spec(tmp_path, [], cloze={"words": ["bad", "yes"]})
    assert building_fingerprint(other) != building_fingerprint(spec(tmp_path, []))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "{text}"}, "expected one field {mask} in the templates of text, found 0"),
        ({"text": ["{mask} {text}", "{mask}"]}, "expected one field {mask} in the templates of text, found 2"),
        ({"text": "It was {mask}."}, "expected a column name between braces"),
        ({"objective": "plain"}, "objective: mlm; add it"),
        ({"cloze": {"words": ["bad", "dull", "great"]}}, "expected a label with 3 classes, one for each word"),
        ({"label": None}, "expected a label with 2 classes"),
        ({"group": "label"}, "takes no choices, group"),
        ({"copies": 2}, "leave copies out"),
    ],
)
def test_what_does_not_go_with_a_cloze_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        spec(tmp_path, [], **options)
    assert message in str(refused.value)
