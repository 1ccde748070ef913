"""Rows of real tasks."""

from pathlib import Path

import pytest
from text_rows import WIC_SPANS, marked, rows
from transformers import PreTrainedTokenizerFast

from online.rows import iter_groups
from online.rows_spec import RowsSpec
from store.strict import parse


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
