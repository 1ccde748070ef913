"""Inner distances against L_sp, and the tail of rare words counted from a real store."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from transformers import BertConfig

from online.batch import IGNORED
from online.kept_words import KeptWords
from store.reader import Store
from student_train.report import drawing
from student_train.report.glmd_distances import glmd_distances
from student_train.report.glmd_words import coverage, glmd_words
from student_train.report.runs import Phase, Run, Runs
from student_train.report.word_counts import word_counts

WORD_LOSS = (8.0, 5.0, 6.0, 2.0, 1.0)


def a_run(folder: Path, method: str, probe: Path | None = None, spec: dict[str, Any] | None = None) -> Run:
    phase = Phase("only", folder, spec or {}, (method,), (), None, None, probe, None)
    return Run(method, folder, None, method, {}, 0, "finished", "", None, (phase,), 0, method)


def probe(folder: Path, method: str, inner: dict[str, list[float]], word_loss: bool = True) -> Run:
    """A run whose probe has L_sp as WORD_LOSS, and the distances ``inner`` of student layer 1 and teacher layer 3."""
    of = dict.fromkeys(("student_layer", "teacher_layer", "temperature"))
    rows = []
    for step, loss in enumerate(WORD_LOSS):
        line = {"step": step, "kind": "distance", **of}
        if word_loss:
            rows.append({**line, "name": "l_sp.T15", "distance": "l_sp", "temperature": 15.0, "value": loss})
        for kind, values in inner.items():
            rows.append({**line, "name": f"{kind}.1-3", "distance": kind, "student_layer": 1, "teacher_layer": 3, "value": values[step]})
    path = folder / f"{method}.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return a_run(folder, method, path)


def printed_cells(axes: Any) -> list[str]:  # noqa: ANN401
    return [text.get_text() for text in axes.texts]


def test_a_distance_that_follows_the_word_loss_has_1_and_one_that_runs_against_it_minus_1(tmp_path: Path) -> None:
    inner = {"hidden": [math.sqrt(value) for value in WORD_LOSS], "value_relation": [-value for value in WORD_LOSS]}
    made = Runs((probe(tmp_path, "glmd", inner), probe(tmp_path, "kd", {"hidden": [1 / value for value in WORD_LOSS]})), "accuracy", False)
    with drawing.style():
        section = glmd_distances(made)
    assert section is not None
    layers, methods = (picture.figure.axes[0] for picture in section.pictures)
    assert layers.get_title(loc="left") == "Spearman, L_sp, T=15"
    assert printed_cells(layers) == [".00", "−1"], "the mean of 1 and -1, and that of the run that has it"
    assert [tick.get_text() for tick in methods.get_yticklabels()] == ["hidden", "value, pair-wise"], "L_sp itself has no row"
    assert sorted(printed_cells(methods)) == ["1", "−1", "−1"]


def test_without_a_word_loss_there_is_no_such_section(tmp_path: Path) -> None:
    run = probe(tmp_path, "kd", {"hidden": list(WORD_LOSS)}, word_loss=False)
    assert glmd_distances(Runs((run,), "accuracy", False)) is None


@pytest.fixture
def compressed(many_words: Path, tmp_path: Path) -> Runs:
    """A finished phase over the store of 410 words, whose student keeps the even ids alone; and one that keeps all."""
    spec = {"data": [{"store": str(many_words / "store"), "pass_name": "tiny"}]}
    made = []
    for name in ("some", "all"):
        student = tmp_path / name / "student"
        BertConfig(vocab_size=410).save_pretrained(student)
        made.append(a_run(tmp_path / name, name, spec=spec))
    kept = torch.arange(0, 410, 2)
    KeptWords(kept, torch.arange(410) // 2).write(tmp_path / "some" / "student")
    return Runs(tuple(made), "loss", True)


def test_words_are_counted_from_the_rows_and_the_share_of_kept_ones_is_that_of_their_tokens(compressed: Runs, many_words: Path) -> None:
    store = Store.open(many_words / "store")
    expected: Counter[int] = Counter()
    for row in store.rows.select("train").tolist():
        packed = store.all_tokens(np.array([row]))
        expected.update(
            token if label == IGNORED else label
            for token, label in zip(packed["input_ids"].tolist(), packed["token_labels"].tolist(), strict=True)
        )
    found, failed = word_counts(compressed)
    assert not failed
    some, whole = found
    assert {word: number for word, number in enumerate(some.counts.tolist()) if number} == expected
    even = sum(number for word, number in expected.items() if word % 2 == 0)
    assert 0 < even < sum(expected.values())
    assert some.covered == pytest.approx(even / sum(expected.values()), abs=1e-12)
    assert whole.covered == 1.0
    with drawing.style():
        section = glmd_words(compressed)
    assert section is not None
    assert [picture.name for picture in section.pictures] == ["glmd-5-1", "glmd-5-2"]
    assert f"The 205 kept words cover {even / sum(expected.values()):.2%} of the tokens" in section.pictures[0].caption
    left = section.pictures[0].figure.axes[0]
    drawn = {line.get_label(): line for line in left.get_lines()}
    assert drawn.keys() == {"kept", "dropped"}
    by_rank = [word for word, _ in sorted(expected.items(), key=lambda item: (-item[1], item[0]))]
    assert drawn["dropped"].get_xdata()[0] == next(rank for rank, word in enumerate(by_rank, 1) if word % 2)
    assert max(max(line.get_ydata()) for line in drawn.values()) == max(expected.values())


def test_coverage_adds_up_the_most_frequent_words_first() -> None:
    assert coverage(np.array([1, 0, 5, 2, 2])).tolist() == pytest.approx([0.5, 0.7, 0.9, 1.0, 1.0])


def test_a_store_that_is_gone_is_said_and_breaks_nothing(tmp_path: Path) -> None:
    BertConfig(vocab_size=10).save_pretrained(tmp_path / "student")
    run = a_run(tmp_path, "kd", spec={"data": [{"store": str(tmp_path / "gone")}]})
    with drawing.style():
        section = glmd_words(Runs((run,), "accuracy", False))
    assert section is not None
    assert not section.pictures
    assert "could not be counted" in section.text[-1]
    assert "gone" in section.text[-1]


def test_runs_without_a_student_have_no_tail(tmp_path: Path) -> None:
    assert glmd_words(Runs((a_run(tmp_path, "kd"),), "accuracy", False)) is None
