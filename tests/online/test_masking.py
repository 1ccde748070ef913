"""Masks have BERT's statistics, are frozen by their address, and leave at least one word to predict."""

import numpy as np
import pytest
from scipy import stats

from online.batch import IGNORED
from online.masking import mask_tokens

MASK, WORDS = 3, np.arange(10, 1000, dtype=np.int32)


def masked(
    ids: np.ndarray,
    candidates: np.ndarray | None = None,
    record: int = 0,
    part: int = 0,
    copy: int = 0,
    seed: int = 0,
    probability: float = 0.15,
) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.ones(len(ids), bool) if candidates is None else candidates
    return mask_tokens(ids, chosen, probability=probability, mask_id=MASK, words=WORDS, seed=seed, address=(record, part, copy))


def test_fifteen_percent_are_chosen_of_which_80_10_10_are_masked_replaced_kept() -> None:
    ids = np.random.default_rng(0).integers(10, 1000, 200_000).astype(np.int32)
    inputs, labels = masked(ids)
    chosen = labels != IGNORED
    masks, kept = inputs == MASK, chosen & (inputs == ids)
    counts = [masks.sum(), kept.sum(), (chosen & ~masks & ~kept).sum()]
    assert stats.binomtest(int(chosen.sum()), len(ids), 0.15).pvalue > 1e-3
    same = 0.1 / len(WORDS)  # a random word may be the word itself
    assert stats.chisquare(counts, np.array([0.8, 0.1 + same, 0.1 - same]) * chosen.sum()).pvalue > 1e-3
    replaced = inputs[chosen & ~masks & ~kept]
    assert stats.chisquare(np.bincount(replaced, minlength=1000)[10:]).pvalue > 1e-3
    np.testing.assert_array_equal(labels[chosen], ids[chosen])
    np.testing.assert_array_equal(inputs[~chosen], ids[~chosen])


def test_only_candidates_are_chosen() -> None:
    ids = np.arange(10, 1000, dtype=np.int32)
    candidates = ids % 3 == 0
    inputs, labels = masked(ids, candidates, probability=1.0)
    np.testing.assert_array_equal(labels != IGNORED, candidates)
    np.testing.assert_array_equal(inputs[~candidates], ids[~candidates])


def test_a_row_has_at_least_one_chosen_token_and_each_candidate_gets_its_turn() -> None:
    ids, candidates = np.arange(10, 15, dtype=np.int32), np.array([False, True, True, True, False])
    places = [np.flatnonzero(masked(ids, candidates, record=n, probability=1e-9)[1] != IGNORED) for n in range(300)]
    assert {len(place) for place in places} == {1}
    assert stats.chisquare(np.bincount(np.concatenate(places))[1:4]).pvalue > 1e-3


def test_the_same_address_gives_the_same_masks_and_every_other_one_different_masks() -> None:
    ids = np.arange(10, 210, dtype=np.int32)
    first = masked(ids, record=5)
    np.testing.assert_array_equal(first, masked(ids, record=5))
    for other in ({"record": 6}, {"record": 5, "part": 1}, {"record": 5, "copy": 1}, {"record": 5, "seed": 1}):
        assert not np.array_equal(first[1], masked(ids, **other)[1])


def test_copies_of_a_text_are_masked_independently() -> None:
    ids = np.arange(10, 1000, dtype=np.int32)
    chosen = np.array([masked(ids, record=n, copy=copy)[1] != IGNORED for n in range(20) for copy in (0, 1)]).reshape(20, 2, -1)
    both = int((chosen[:, 0] & chosen[:, 1]).sum())
    assert stats.binomtest(both, chosen[:, 0].size, 0.15**2).pvalue > 1e-3


def test_the_masks_of_a_seed_never_change() -> None:
    """A golden value: stores built earlier stay reproducible. Bump online.rows.BUILDING when this changes."""
    inputs, labels = masked(np.arange(100, 120, dtype=np.int32), record=7, copy=1, seed=3, probability=0.3)
    chosen = np.flatnonzero(labels != IGNORED)
    assert list(zip(chosen.tolist(), inputs[chosen].tolist(), strict=True)) == [(1, 3), (9, 60), (10, 609), (11, 111), (14, 3)]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_rows_are_masked_too(length: int) -> None:
    inputs, labels = masked(np.full(length, 50, np.int32))
    assert inputs.dtype == labels.dtype == np.int32
    assert (labels != IGNORED).any()
