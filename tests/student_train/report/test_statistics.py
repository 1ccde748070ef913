"""The report's statistics against SciPy called by itself, textbook formulas and numbers worked out by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from student_train.report.statistics import bootstrap, holm, paired_p, spans_zero

ONE = np.array([0.81, 0.79, 0.84, 0.80, 0.83])
OTHER = np.array([0.78, 0.80, 0.79, 0.77, 0.80])


def test_the_paired_test_is_students() -> None:
    found = paired_p(ONE, OTHER)
    assert found == pytest.approx(stats.ttest_rel(ONE, OTHER).pvalue, rel=1e-12)

    differences = [a - b for a, b in zip(ONE.tolist(), OTHER.tolist(), strict=True)]
    mean = sum(differences) / 5
    variance = sum((one - mean) ** 2 for one in differences) / 4
    t = mean / math.sqrt(variance / 5)
    assert found == pytest.approx(2 * stats.t.sf(abs(t), 4), rel=1e-12)


@pytest.mark.parametrize("other", [ONE, ONE - 0.125, ONE + 1e-15], ids=["equal", "shifted", "rounding"])
def test_pairs_that_all_differ_by_the_same_are_not_tested(other: np.ndarray) -> None:
    assert paired_p(ONE, other) is None


def test_one_pair_is_not_tested() -> None:
    assert paired_p(ONE[:1], OTHER[:1]) is None
    assert bootstrap(ONE[:1], OTHER[:1]) is None


def test_holms_correction_is_the_one_worked_out_by_hand() -> None:
    # sorted 0.01, 0.02, 0.03, 0.04: times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.04, and none less than the one before
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    # 0.005 x 3 = 0.015; 0.4 x 2 = 0.8; 0.7 x 1 = 0.7 -> 0.8
    assert holm([0.7, 0.005, 0.4]) == pytest.approx([0.8, 0.015, 0.8])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([0.03]) == pytest.approx([0.03])
    assert holm([]) == []


def test_the_bootstrap_interval_is_that_of_the_mean_difference() -> None:
    draws = np.random.default_rng(1)
    one = draws.normal(0.3, 1.0, 400)
    other = draws.normal(0.0, 1.0, 400)
    interval = bootstrap(one, other)
    assert interval is not None
    low, high = interval
    differences = one - other
    half = 1.96 * differences.std(ddof=1) / 20  # the normal approximation, which 400 pairs are enough for
    assert low == pytest.approx(differences.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(differences.mean() + half, abs=0.15 * half)
    assert bootstrap(one, other) == interval


def test_the_bootstrap_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draws = np.random.default_rng(2)
    covered = 0
    for _ in range(60):
        interval = bootstrap(draws.normal(0.5, 1.0, 40), draws.normal(0.0, 1.0, 40))
        assert interval is not None
        covered += interval[0] <= 0.5 <= interval[1]
    assert 51 <= covered <= 60  # 57 expected; fewer than 51 would happen once in 200 times


def test_pairs_that_all_differ_by_the_same_leave_no_room_to_the_bootstrap() -> None:
    assert bootstrap(ONE + 0.5, ONE) == pytest.approx((0.5, 0.5))


def test_an_interval_spans_zero_with_its_ends() -> None:
    assert spans_zero((-0.1, 0.2))
    assert spans_zero((0.0, 0.2))
    assert not spans_zero((0.01, 0.2))
    assert not spans_zero((-0.2, -0.01))
