"""Copies are what draws and candidates say, word by word, and nothing else of a text changes."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from tiny_cloze import LENGTH, WORDS, likeliest, make_model, make_tokenizer

from online.augment import BLOCK, STOP_WORDS, AugmentSpec, Copy, augmented, draw, is_replaceable, words_of
from online.cloze import Cloze
from online.corpus import Record, SourceSpec, read_records
from online.models import LoadedModel
from online.word_vectors import WordVectors

CONTENT = [word for word in WORDS if word not in ("the", "a", "in", "of", "and")]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return make_model(make_tokenizer())


@pytest.fixture(scope="module")
def cloze(loaded: LoadedModel) -> Cloze:
    return Cloze(loaded, torch.device("cpu"), LENGTH)


def records(rows: Iterable[dict[str, object]]) -> list[Record]:
    return [Record(0, "a.parquet", number, number, "train", dict(values)) for number, values in enumerate(rows)]


def copies(texts: Sequence[str | None], cloze: Cloze, vectors: WordVectors | None = None, **options: object) -> list[Copy]:
    spec = AugmentSpec.model_validate({"columns": ["text"], "max_length": LENGTH, **options})
    return list(augmented(records({"text": text} for text in texts), spec, cloze, vectors))


def vectors_of(words: list[str]) -> WordVectors:
    """Vectors that turn from word to word, so that to the first one its neighbours are near in their order."""
    angles = 0.1 * np.arange(len(words))
    return WordVectors(words, np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32), "")


# Which words


def test_words_lie_between_white_space_and_punctuation() -> None:
    text = "It's  «well-known», isn’t_it?\tcafé № 42nd…end"
    assert [text[start:end] for start, end in words_of(text)] == [
        "It", "s", "well", "known", "isn", "t", "it", "café", "№", "42nd", "end",
    ]  # fmt: skip
    assert words_of("") == words_of(" -- ") == []


def test_only_words_of_letters_that_are_no_function_words_are_replaceable() -> None:
    assert [word for word in ("river", "River", "café", "who", "what", "x", "北京") if not is_replaceable(word)] == []
    left_alone = ["the", "The", "NOT", "don", "t", "s", "ll", "3d", "1984", "№", "e\u0301te", "", "word's"]
    assert [word for word in left_alone if is_replaceable(word)] == []
    assert len(STOP_WORDS) == 145, "as many as the authors' code has without an apostrophe"
    assert all(word.isalpha() and word.islower() for word in STOP_WORDS)


# Draws


def test_a_draw_depends_on_its_address_and_not_on_the_words_behind_it() -> None:
    chances, choices = draw(50, seed=3, address=(7, 1, 2))
    for words in (1, 2, 3, 49):
        np.testing.assert_array_equal(draw(words, seed=3, address=(7, 1, 2))[0], chances[:words])
        np.testing.assert_array_equal(draw(words, seed=3, address=(7, 1, 2))[1], choices[:words])
    for seed, address in ((4, (7, 1, 2)), (3, (8, 1, 2)), (3, (7, 0, 2)), (3, (7, 1, 3))):
        assert len(np.intersect1d(draw(50, seed=seed, address=address)[1], choices)) == 0


def test_the_draws_of_a_seed_never_change() -> None:
    """A golden value: augmented texts made earlier stay reproducible. Bump online.augment.AUGMENTING when this changes."""
    chances, choices = draw(4, seed=3, address=(7, 0, 1))
    raw = np.random.Philox(key=[3, 1], counter=[0, 1, 0, 7]).random_raw(8)
    assert [int(number) for number in raw[:2]] == [13138029587210398073, 10919071313489377870]
    assert chances.tolist() == [(int(number) >> 11) / 2**53 for number in raw[::2]]
    assert choices.tolist() == raw[1::2].tolist()


def test_draws_are_uniform() -> None:
    drawn = [draw(20, seed=0, address=(record, column, copy)) for record in range(50) for column in range(2) for copy in range(1, 11)]
    chances, choices = (np.concatenate(part) for part in zip(*drawn, strict=True))
    assert stats.kstest(chances, "uniform").pvalue > 1e-3
    assert stats.chisquare(np.bincount((choices % 15).astype(int), minlength=15)).pvalue > 1e-3
    assert abs(stats.pearsonr(chances, choices % 15).statistic) < 0.03


# Copies


def test_copies_hold_the_candidates_that_were_drawn_in_the_words_place(loaded: LoadedModel, cloze: Cloze) -> None:
    """Golden candidates, each from the record as it stands; what is drawn from them by hand."""
    tokens = ["the", "old", "river", ",", "and", "people", "in", "the", "city", "."]
    text = "The  old River, and people in the CITY."
    places = {1: 1, 2: 2, 4: 5, 7: 8}  # number of a word -> of its token
    written = {1: "old", 2: "River", 4: "people", 7: "CITY"}
    found = copies([text], cloze, copies=40, candidates=3, probability=0.6, seed=9)
    assert [copy.copy for copy in found] == list(range(41))
    assert found[0].values == {"text": text}
    for copy in found[1:]:
        chances, choices = draw(8, seed=9, address=(0, 0, copy.copy))
        expected = text
        for word, place in places.items():
            if chances[word] < 0.6:
                new = likeliest(loaded, tokens, place, WORDS, 3)[int(choices[word]) % 3]
                expected = expected.replace(written[word], new.capitalize() if written[word] == "River" else new)
        assert copy.values["text"] == expected
    assert len({str(copy.values["text"]) for copy in found}) > 20


def test_the_share_of_replaced_words_is_the_probability_and_candidates_are_alike(cloze: Cloze) -> None:
    """Words that are in their own candidates are left out of the count: replaced by themselves, they look untouched."""
    texts = [f"{first} {second}" for first in CONTENT[:8] for second in CONTENT[8:16]]
    spans = [[(0, text.index(" "))] for text in texts]
    candidates = [answers[0] for answers in cloze.answers(texts, spans, 5)]
    kept, replaced = 0, Counter[int]()
    for copy in copies(texts, cloze, copies=200, candidates=5):
        first = str(copy.values["text"]).split()[0]
        original, answer = texts[copy.original].split()[0], candidates[copy.original]
        if copy.copy and answer is not None and original not in answer:
            kept += first == original
            replaced.update([answer.index(first)] if first != original else [])
    total = kept + replaced.total()
    assert total > 2000
    assert stats.binomtest(replaced.total(), total, 0.4).pvalue > 1e-3
    assert stats.chisquare([replaced[number] for number in range(5)]).pvalue > 1e-3


def test_words_of_several_pieces_get_neighbours_or_stay(cloze: Cloze) -> None:
    texts = ["Rivers of the", "fielding of the"]  # which has no vector
    vectors = vectors_of(["rivers", "seas", "lakes", "oceans", "river"])
    without = copies(texts, cloze, probability=1.0)
    assert {str(copy.values["text"]) for copy in without} == set(texts)
    found = copies(texts, cloze, vectors, probability=1.0, candidates=2, copies=30)
    assert {str(copy.values["text"]) for copy in found if copy.copy} == {"Lakes of the", "Seas of the", "fielding of the"}


def test_both_columns_of_a_pair_are_drawn_and_the_others_repeated(cloze: Cloze) -> None:
    rows = [{"one": "river city people", "two": "river city people", "label": 3}, {"one": None, "two": "", "label": None}]
    spec = AugmentSpec(columns=("one", "two"), copies=30, max_length=LENGTH)
    found = list(augmented(records(rows), spec, cloze, None))
    first, second = found[:31], found[31:]
    assert all(copy.values["label"] == 3 for copy in first)
    assert [copy.values for copy in second] == [rows[1]] * 31
    changed = [(copy.values["one"] != rows[0]["one"], copy.values["two"] != rows[0]["two"]) for copy in first]
    assert set(changed[1:]) == {(False, False), (True, False), (False, True), (True, True)}
    alone = copies(["river city people"], cloze, copies=30)
    assert [copy.values["one"] for copy in first] == [copy.values["text"] for copy in alone], "column 0 whatever stands beside it"


def test_repeats_are_dropped_where_asked(cloze: Cloze) -> None:
    texts = ["river", "of the 7 ."]
    every = copies(texts, cloze, copies=50, candidates=3)
    few = copies(texts, cloze, copies=50, candidates=3, repeats="drop")
    assert len(every) == 2 * 51
    expected, seen = [], set()
    for copy in every:
        if (copy.original, copy.values["text"]) not in seen:
            expected.append(copy)
            seen.add((copy.original, copy.values["text"]))
    assert few == expected
    assert [copy.copy for copy in few if copy.original == 1] == [0]


def test_copies_do_not_depend_on_how_many_records_are_read_at_once(tmp_path: Path, cloze: Cloze) -> None:
    """More records than are asked about together, in long and short texts."""
    draws = np.random.default_rng(2)
    texts = [" ".join(draws.choice(CONTENT, draws.integers(1, 25))) for _ in range(BLOCK + 60)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=100)
    source = SourceSpec(files=(str(tmp_path / "a.parquet"),))
    spec = AugmentSpec(columns=("text",), copies=3, max_length=LENGTH)
    found = [list(augmented(read_records([source], ["text"], read_rows=rows), spec, cloze, None)) for rows in (1, 7, 1024)]
    assert len(found[0]) == 4 * len(texts)
    assert found[0] == found[1] == found[2]


def test_a_value_that_is_no_text_is_named(cloze: Cloze) -> None:
    with pytest.raises(ValueError, match=r"a\.parquet, record 1 .*: column 'text' holds a list; expected text"):
        copies(["river", ["river"]], cloze)  # type: ignore[list-item]
