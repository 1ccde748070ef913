"""The names of what is kept of word predictions, and the random numbers that words are drawn by."""

import numpy as np
import pytest
import torch

from online.batch import Batch
from online.seeds import seeds as seeds_on_device
from online.seeds import uniforms as uniforms_on_device
from store.features import FeatureKey
from store.forms import WordForm, word_form
from store.seeds import token_seeds, uniforms

FORMS = {
    "top64": WordForm(top=64),
    "top64p95": WordForm(top=64, nucleus=0.95),
    "top100p999min4": WordForm(top=100, nucleus=0.999, least=4),
    "draw50": WordForm(draws=50),
    "draw50tau80": WordForm(draws=50, tau=0.8),
    "draw50tau120x4": WordForm(draws=50, tau=1.2, samples=4),
    "top4draw9": WordForm(top=4, draws=9),
    "top4draw9x4": WordForm(top=4, draws=9, samples=4),
}


@pytest.mark.parametrize("text", FORMS)
def test_a_form_is_read_and_written_as_one_name(text: str) -> None:
    assert word_form(text) == FORMS[text]
    assert str(FORMS[text]) == text
    assert FeatureKey.parse(f"bert/lm_logits@labels:{text}").words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("draw50x1", "the form draw50x1 is written draw50"),
        ("draw50tau100", "is written draw50"),
        ("top9p5min1", "is written top9p5"),
        ("top4p95min9", "at least 9 of at most 4 words"),
        ("top4draw9tau80", "the others are drawn as they are; leave tau out"),
        ("draw65536", "expected at most 65535 draws, found 65536"),
        ("top64p", "unknown form"),
        ("top64p90", "unknown form"),
        ("draw", "unknown form"),
        ("top0draw3", "unknown form"),
        ("draw3x2tau80", "unknown form"),
    ],
)
def test_a_form_that_means_nothing_or_has_another_name_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureKey.parse(f"lm_logits@labels:{text}")


def test_only_forms_that_leave_places_unused_are_ragged_and_no_more_words_are_kept_than_there_are() -> None:
    assert [text for text, form in FORMS.items() if form.ragged] == [
        "top64p95",
        "top100p999min4",
        "draw50",
        "draw50tau80",
        "draw50tau120x4",
    ]
    WordForm(top=9).check(9)
    WordForm(top=8, draws=3).check(9)
    WordForm(draws=30).check(9)
    for form in (WordForm(top=10), WordForm(top=9, draws=3)):
        with pytest.raises(ValueError, match=f"the vocabulary has 9 words, fewer than {form} asks for"):
            form.check(9)


def by_hand(ids: list[int], place: int, number: int) -> float:
    """The uniform number of a token, from SplitMix64 as published, on Python's whole numbers."""
    most = (1 << 64) - 1

    def mix(value: int) -> int:
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & most
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & most
        return value ^ (value >> 31)

    row = sum(mix(mix(at + 1) ^ word) for at, word in enumerate(ids)) & most
    bits = mix((mix(row ^ mix(place + 1)) + (number + 1) * 0x9E3779B97F4A7C15) & most) >> 16
    return (bits + 0.5) / 2**48


def test_the_numbers_of_a_token_follow_from_its_row_and_place_alone_in_both_halves() -> None:
    rows = [[101, 7, 7, 29_999, 102], [101, 7, 29_999, 7, 102], [149_999], [3, 3]]
    mask, ids = torch.zeros(4, 9, dtype=torch.bool), torch.full((4, 9), 77)  # 77 stands on padding
    for number, (row, start) in enumerate(zip(rows, (0, 3, 8, 2), strict=True)):
        mask[number, start : start + len(row)] = True
        ids[number, start : start + len(row)] = torch.tensor(row)
    labels = torch.where(mask & (ids == 7), 5, -100)
    batch = Batch(torch.arange(4), ids, mask, None, None, None, labels, None, torch.arange(4))
    found = uniforms_on_device(seeds_on_device(batch, "all")[mask], 6).numpy()
    expected = np.array([[by_hand(row, place, number) for number in range(6)] for row in rows for place in range(len(row))])
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.concatenate([uniforms(token_seeds(np.array(row)), 6) for row in rows]), expected)
    assert len(np.unique(expected)) == expected.size
    of_labels = uniforms_on_device(seeds_on_device(batch, "labels"), 6).numpy()
    np.testing.assert_array_equal(of_labels, expected[[1, 2, 6, 8]])
    for positions, places in {"first": [0, 5, 10, 11], "mean": [0, 5, 10, 11], "last": [4, 9, 10, 12]}.items():
        np.testing.assert_array_equal(uniforms_on_device(seeds_on_device(batch, positions), 6).numpy(), expected[places])


def test_the_numbers_are_uniform() -> None:
    found = uniforms(token_seeds(np.arange(2000) % 7), 20).ravel()
    assert 0 < found.min() < found.max() < 1
    counts = np.histogram(found, 50, (0, 1))[0]
    expected = found.size / 50
    assert ((counts - expected) ** 2 / expected).sum() < 95  # chi squared of 49 degrees: 1 in 10,000 would be above
