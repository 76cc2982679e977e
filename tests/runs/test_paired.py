"""Intervals of paired differences, by hand."""

import pytest

from kd_detectron.runs.paired import (
    Estimate,
    mean_and_deviation,
    ratio_with_interval,
    t_quantile,
)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.3027), (10, 2.2281), (11, 2.2010), (30, 2.0423), (1000, 1.9623)],
)
def test_quantiles_are_those_of_the_printed_tables(degrees, quantile):
    assert t_quantile(degrees) == pytest.approx(quantile, abs=2e-4)


def test_mean_of_two_seeds_by_hand():
    # Mean 2, deviation sqrt(2), standard error 1.
    estimate = ratio_with_interval([1.0, 3.0], [1.0, 1.0])
    expected = (2.0, 2 - 12.7062, 2 + 12.7062)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx(expected)


def test_one_seed_has_no_interval():
    assert mean_and_deviation([1.5]) == Estimate(1.5)
    assert ratio_with_interval([1.5], [3.0]) == Estimate(0.5)


def test_gain_that_is_always_the_same_share_of_the_gap_is_certain():
    assert ratio_with_interval([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]) == Estimate(0.5, None, 0.5, 0.5)


def test_share_of_two_seeds_by_hand():
    # Gap 4 in both, so the interval is that of the gain over 4.
    share = ratio_with_interval([1.0, 3.0], [4.0, 4.0])
    assert (share.mean, share.low) == pytest.approx((0.5, (2 - 12.7062) / 4))
