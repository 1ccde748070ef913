"""Which words a smaller vocabulary keeps and which stand for the others: against loops in float64, and properties of any map."""

from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from online.batch import IGNORED
from store.reader import Store
from student_train.blocks import Source
from student_train.recipe import DataSpec, VocabularySpec
from student_train.vocabulary import count, forced_words, input_embedding, kept_size, nearest, places_of, ranked

MEASURES = ("inner_product", "cosine", "euclidean")


def test_bert_at_half_keeps_15360_words_and_no_vocabulary_grows() -> None:
    assert kept_size(0.5, 30522) == 15360
    assert kept_size(0.5, 256) == 128
    assert kept_size(0.501, 256) == 128, "int(128.256) = 128"
    assert kept_size(0.51, 256) == 256
    assert kept_size(1.0, 30522) == 30522
    assert kept_size(0.1, 40) == 40
    assert kept_size(0.001, 1000) == 128


def test_words_are_counted_as_they_were_before_masking_and_without_padding(many_words: Path) -> None:
    store = Store.open(many_words / "store")
    data = DataSpec(store=many_words / "store", pass_name="tiny")
    expected: Counter[int] = Counter()
    masked = 0
    for row in store.rows.select("train").tolist():
        packed = store.all_tokens(np.array([row]))
        for token, label in zip(packed["input_ids"].tolist(), packed["token_labels"].tolist(), strict=True):
            expected[token if label == IGNORED else label] += 1
            masked += label != IGNORED
    counts = count([data], 410)
    assert masked > 0
    assert {word: number for word, number in enumerate(counts.tolist()) if number} == expected
    assert counts[4] == 0, "[MASK] is nobody's original"
    assert (count([data, data], 410) == 2 * counts).all()
    with pytest.raises(ValueError, match=r"has the token 39\d, its source embeds 300 words"):
        count([data], 300)


def test_the_order_is_forced_words_then_others_each_by_how_often_they_come() -> None:
    counts = np.array([0, 7, 2, 9, 2, 5])
    assert ranked(counts, frozenset({0, 2, 5})).tolist() == [5, 2, 0, 3, 1, 4]
    assert ranked(counts, frozenset()).tolist() == [3, 1, 5, 2, 4, 0], "of equal ones the first id"


def test_special_tokens_and_kept_words_are_forced_also_in_lower_case(tiny_words: ModuleType) -> None:
    tokenizer = tiny_words.tokenizer()
    assert forced_words(VocabularySpec(), tokenizer, 410) == {0, 1, 2, 3, 4}
    assert forced_words(VocabularySpec(keep=("Great",)), tokenizer, 410) == {0, 1, 2, 3, 4, 398, 399}
    assert forced_words(VocabularySpec(keep=("great", "w7")), tokenizer, 410) == {0, 1, 2, 3, 4, 398, 7}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"keep": ["w7 w8"]}, "'w7 w8' is cut into 2: w7 w8"),
        ({"keep": ["terrible"]}, "does not know 'terrible'"),
        ({"keep": [""]}, "'' is cut into 0: nothing"),
        ({"rate": 0.01, "keep": [f"w{number}" for number in range(5, 135)]}, "135 words are to be kept in any case, of 128: raise rate"),
    ],
)
def test_words_that_cannot_be_kept_are_refused(spec: dict[str, object], message: str, tiny_words: ModuleType) -> None:
    with pytest.raises(ValueError, match=message):
        forced_words(VocabularySpec.model_validate(spec), tiny_words.tokenizer(), 410)


def test_the_unknown_token_must_exist_to_stand_for_words(tiny_words: ModuleType) -> None:
    tokenizer = tiny_words.tokenizer()
    tokenizer.unk_token = None
    with pytest.raises(ValueError, match="map: unk needs an unknown token"):
        forced_words(VocabularySpec(map="unk"), tokenizer, 410)


def by_loops(vectors: list[list[float]], kept: list[int], measure: str) -> list[int]:
    """The place of each word's nearest kept one, word by word."""
    places = []
    for word in range(len(vectors)):
        scores = []
        for other in kept:
            product = sum(a * b for a, b in zip(vectors[word], vectors[other], strict=True))
            if measure == "cosine":
                product /= sum(b * b for b in vectors[other]) ** 0.5
            if measure == "euclidean":
                product = -sum((a - b) ** 2 for a, b in zip(vectors[word], vectors[other], strict=True))
            scores.append(product)
        places.append(scores.index(max(scores)))
    return places


@pytest.mark.parametrize("measure", MEASURES)
def test_the_nearest_kept_word_is_what_loops_in_float64_find(measure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("student_train.vocabulary._PRODUCTS", 100)  # several blocks
    generator = torch.Generator().manual_seed(3)
    vectors_VW = torch.randn(60, 5, generator=generator) * torch.rand(60, 1, generator=generator).exp()
    kept = torch.randperm(60, generator=generator)[:21]
    expected = by_loops(vectors_VW.double().tolist(), kept.tolist(), measure)
    assert nearest(vectors_VW, kept, measure).tolist() == expected


def test_the_three_measures_differ() -> None:
    vectors_VW = torch.tensor([[1.0, 0.0], [5.0, 5.0], [2.0, 0.0], [0.9, 0.4]])
    kept = torch.tensor([1, 2, 3])
    assert [int(nearest(vectors_VW, kept, measure)[0]) for measure in MEASURES] == [0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_map_leads_kept_words_to_themselves_and_the_others_to_kept_ones(data: st.DataObject) -> None:
    words = data.draw(st.integers(2, 300))
    rate = data.draw(st.floats(0.01, 1))
    size = kept_size(rate, words)
    forced = data.draw(st.frozensets(st.integers(0, words - 1), max_size=size))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    counts = torch.randint(0, 20, (words,), generator=generator).numpy()
    kept = torch.from_numpy(ranked(counts, forced)[:size])
    vectors_VW = torch.randn(words, 3, generator=generator)
    made = places_of(kept, words, nearest(vectors_VW, kept, data.draw(st.sampled_from(MEASURES))))
    assert size == words or (size % 128 == 0 and size - 128 < max(1, int(rate * words)) <= size)
    assert sorted(set(kept.tolist())) == sorted(kept.tolist())
    assert forced <= set(kept.tolist())
    others = set(range(words)) - set(kept.tolist())
    assert max((counts[list(others)].max() if others else 0), 0) <= min(
        (int(counts[k]) for k in kept.tolist() if k not in forced), default=99
    )
    assert made.kept[made.places[kept]].tolist() == kept.tolist()
    assert set(made.kept[made.places].tolist()) == set(kept.tolist())
    assert made.representatives == len({int(made.places[word]) for word in others})


def test_the_source_s_embedding_is_read_without_the_model(many_words: Path, tmp_path: Path, tiny_words: ModuleType) -> None:
    weights = load_file(many_words / "teacher" / "model.safetensors")
    found = input_embedding(Source(many_words / "teacher", "masked_lm"))
    assert torch.equal(found, weights["bert.embeddings.word_embeddings.weight"])
    base = tiny_words.write_model(tmp_path / "base", "base", "distilbert", dim=16, n_layers=1, n_heads=2, hidden_dim=24)
    assert input_embedding(Source(base, "base")).shape == (410, 16)
