"""Masks of rows: what is hidden, what stays, and that draws depend on nothing else."""

from pathlib import Path

import numpy as np
import pytest
from text_rows import jsonl, rows, same, spec
from transformers import PreTrainedTokenizerFast

from online.batch import IGNORED
from online.rows_spec import RowsSpec, building_fingerprint, corpus_fingerprint
from store.strict import parse


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
