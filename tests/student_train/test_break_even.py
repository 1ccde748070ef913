"""Cache or recompute: the formula against counting passes one by one."""

import pytest

from student_train.break_even import Passes, Rates


def passes(compute: float, read: float, count: float) -> Passes:
    """Passes that take so many seconds to compute and to read: 1,000 tokens, a teacher of 10^9 operations a second."""
    return Passes(tokens=1000, count=count, flops=compute * 1e6, bytes=read * 1e3, rates=Rates(flops=1e9, bandwidth=1e6))


def test_seconds_follow_from_operations_bytes_and_rates() -> None:
    one = passes(compute=3, read=2, count=5)
    assert (one.compute, one.read, one.dump) == pytest.approx((3, 2, 3))
    assert one.live == pytest.approx(15)
    assert one.stored == pytest.approx(3 + 5 * 2)


@pytest.mark.parametrize(("compute", "read"), [(3.0, 2.0), (7.0, 1.0), (10.0, 9.5), (1.0, 1e-6)])
def test_a_store_pays_from_the_first_pass_at_which_counting_says_so(compute: float, read: float) -> None:
    even = passes(compute, read, 1).even
    assert even is not None
    first = next(n for n in range(1, 1000) if max(compute, read) + n * read < n * compute)
    assert first - 1 <= even < first
    assert not passes(compute, read, first - 1).pays
    assert passes(compute, read, first).pays


@pytest.mark.parametrize(("compute", "read"), [(2.0, 2.0), (1.0, 4.0)])
def test_a_store_that_is_read_no_faster_than_the_teacher_computes_never_pays(compute: float, read: float) -> None:
    assert passes(compute, read, 1).even is None
    assert not any(passes(compute, read, 10**n).pays for n in range(9))


def test_at_the_least_bandwidth_reading_takes_as_long_as_computing() -> None:
    slow = passes(compute=3, read=5, count=1)
    bound = Rates(slow.rates.flops, slow.least_bandwidth)
    same = Passes(slow.tokens, slow.count, slow.flops, slow.bytes, bound)
    assert same.read == pytest.approx(same.compute)
    assert slow.least_bandwidth == pytest.approx(1e6 * 5 / 3)
