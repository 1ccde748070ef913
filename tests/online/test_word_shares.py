"""Ranks that each have the logits of some words keep what a rank keeps that has all. They are threads here."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from online.batch import IGNORED, Selected, TopBanded, TopK
from online.vocabulary import select
from online.word_forms import in_form
from online.word_shares import combines, in_form_of_shares, select_of_shares
from online.words import Share
from store.features import FeatureKey
from store.forms import WordForm, word_form

LSE_TOLERANCE = 1e-6
"""Of log-sum-exps of about 5: sums are taken in another order."""
CUTS = {"even": [0, 20], "the last has one word": [0, 21, 39], "the last has none": [0, 20, 40], "fewer than are kept": [0, 3, 38]}
WORDS = 40


def on_ranks(cuts: Sequence[int], logits_MV: Tensor, work: Callable[[Share, Tensor], object]) -> list[object]:
    """What ``work`` gives on ranks that have the words between ``cuts`` (the last one up to the end)."""
    ends = [*cuts[1:], WORDS]
    meeting, said = threading.Barrier(len(cuts), timeout=20), [torch.empty(0)] * len(cuts)

    def gathered(rank: int, value: Tensor) -> Tensor:
        said[rank] = value
        meeting.wait()
        found = torch.stack(said)
        meeting.wait()
        return found

    def rank(number: int) -> object:
        share = Share(lambda input_MW: input_MW, cuts[number], WORDS, lambda value: gathered(number, value))
        return work(share, logits_MV[:, cuts[number] : ends[number]])

    with ThreadPoolExecutor(len(cuts)) as pool:
        return list(pool.map(rank, range(len(cuts))))


def logits(seed: int = 0) -> Tensor:
    """Some with ties, some with words that cannot be, one flat, one with all in one word."""
    logits_MV = torch.randn(12, WORDS, generator=torch.Generator().manual_seed(seed)) * 2
    logits_MV[:4] = logits_MV[:4].round()
    logits_MV[4, 7:31] = -torch.inf
    logits_MV[5] = 1.5
    logits_MV[6, 21] = 90.0
    logits_MV[7] = -torch.inf
    logits_MV[7, [3, 30, 39]] = torch.tensor([1.0, 2.0, 1.0])
    return logits_MV


def form_of(name: str) -> WordForm:
    form = word_form(name)
    assert form is not None
    return form


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("name", ["top1", "top5", "top40", "top5p9", "top9p8min2"])
def test_likeliest_words_are_those_of_one_rank_also_among_equals(name: str, cuts: str) -> None:
    form, logits_MV = form_of(name), logits()
    expected = in_form(form, logits_MV, torch.zeros(12, dtype=torch.int64))
    assert isinstance(expected, TopK)
    for found in on_ranks(CUTS[cuts], logits_MV, lambda share, part: in_form_of_shares(form, share, part)):
        assert isinstance(found, TopK)
        assert torch.equal(found.ids, expected.ids)
        torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)
        torch.testing.assert_close(found.log_tail, expected.log_tail, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)


@pytest.mark.parametrize("cuts", CUTS)
def test_the_order_of_likeliest_words_is_by_logit_and_then_by_id(cuts: str) -> None:
    logits_MV = logits(1)[:4].round()
    expected = [sorted(range(WORDS), key=lambda word, row=row: (-float(row[word]), word))[:7] for row in logits_MV]
    for found in on_ranks(CUTS[cuts], logits_MV, lambda share, part: in_form_of_shares(form_of("top7"), share, part)):
        assert isinstance(found, TopK)
        assert found.ids.tolist() == expected
        lse_M = torch.tensor([float(row.double().exp().sum().log()) for row in logits_MV])
        torch.testing.assert_close(
            logits_MV.gather(1, found.ids) - found.log_probs, lse_M[:, None].expand(-1, 7), rtol=0, atol=LSE_TOLERANCE
        )


@pytest.mark.parametrize("cuts", CUTS)
def test_bands_that_lie_over_two_ranks_have_the_mass_of_both(cuts: str) -> None:
    form, logits_MV = form_of("top3band7"), logits(2)
    expected = in_form(form, logits_MV, torch.zeros(12, dtype=torch.int64))
    assert isinstance(expected, TopBanded)
    for found in on_ranks(CUTS[cuts], logits_MV, lambda share, part: in_form_of_shares(form, share, part)):
        assert isinstance(found, TopBanded)
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.bands, expected.bands)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("ids", [(), (0, 39, 20, 3)])
def test_chosen_words_and_the_true_one_come_from_the_rank_that_has_them(ids: tuple[int, ...], cuts: str) -> None:
    logits_MV, labels_M = logits(3), torch.tensor([0, 39, 20, IGNORED, 5, 7, 21, 3, IGNORED, 38, 19, 2])
    expected = select(logits_MV, ids, labels_M)
    for found in on_ranks(CUTS[cuts], logits_MV, lambda share, part: select_of_shares(share, part, ids, labels_M)):
        assert isinstance(found, Selected)
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.logits, expected.logits)
        torch.testing.assert_close(found.true_logit, expected.true_logit, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(found.log_sum_exp, expected.log_sum_exp, rtol=0, atol=LSE_TOLERANCE * 16)


def test_more_words_than_there_are_are_refused_on_every_rank() -> None:
    with pytest.raises(ValueError, match="top41: the vocabulary has 40 words"):
        on_ranks(CUTS["even"], logits(), lambda share, part: in_form_of_shares(form_of("top41"), share, part))


def test_draws_take_the_logits_of_all_words() -> None:
    combined = {
        form: combines(FeatureKey.parse(f"lm_logits@labels:{form}"))
        for form in ("top5", "top5p9", "top3band7", "select", "draw5", "top2draw3")
    }
    assert combined == {"top5": True, "top5p9": True, "top3band7": True, "select": True, "draw5": False, "top2draw3": False}
