"""Known answers, and intervals that cover the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from shortstack.devices.stats import (
    drift,
    median,
    median_interval,
    paired_ratio_interval,
    percentile,
    ratio_interval,
    spread,
    summarize,
)


def test_known_answers() -> None:
    assert median([3, 1, 2]) == 2
    assert median([4, 1, 3, 2]) == 2.5
    assert percentile(range(101), 5) == 5
    assert percentile(range(101), 95) == 95
    assert spread([9, 11]) == pytest.approx(np.sqrt(2) / 10)


def test_a_summary_of_one_value_has_no_spread() -> None:
    one = summarize([7.0])
    assert (one.median, one.p5, one.p95, one.spread, one.n) == (7, 7, 7, None, 1)


def test_a_constant_ratio_has_an_interval_of_no_width() -> None:
    found = paired_ratio_interval([2, 4, 6, 8], [1, 2, 3, 4])
    assert (found.estimate, found.low, found.high, found.n) == (2, 2, 2, 4)


def test_the_same_seed_gives_the_same_interval() -> None:
    sample = np.random.default_rng(1).normal(10, 1, 9)
    assert median_interval(sample, seed=5) == median_interval(sample, seed=5)


def test_five_values_give_the_whole_range() -> None:
    """With five, no resampled median is surely inside: the honest interval is min to max."""
    found = median_interval([1, 2, 3, 4, 5])
    assert (found.low, found.high) == (1, 5)


def test_pairing_removes_a_drift_that_swamps_the_unpaired_interval() -> None:
    rng = np.random.default_rng(2)
    clock = np.linspace(1.0, 0.5, 10)  # the machine loses half its speed during the run
    fast = 130 * clock * rng.normal(1, 0.005, 10)
    slow = 100 * clock * rng.normal(1, 0.005, 10)
    paired, unpaired = paired_ratio_interval(fast, slow), ratio_interval(fast, slow)
    assert paired.low < 1.3 < paired.high
    assert paired.high - paired.low < 0.1 * (unpaired.high - unpaired.low)


@pytest.mark.parametrize("rounds", [6, 12])
def test_the_paired_interval_covers_the_truth_as_often_as_it_says(rounds: int) -> None:
    rng = np.random.default_rng(rounds)
    hits, campaigns = 0, 300
    for seed in range(campaigns):
        drifting = np.exp(np.cumsum(rng.normal(0, 0.05, rounds)))
        above = 1.25 * drifting * rng.lognormal(0, 0.02, rounds)
        below = drifting * rng.lognormal(0, 0.02, rounds)
        found = paired_ratio_interval(above, below, seed=seed, resamples=1000)
        hits += found.low <= 1.25 <= found.high
    assert 0.90 <= hits / campaigns <= 0.995


def test_the_unpaired_interval_covers_the_truth_too() -> None:
    rng = np.random.default_rng(0)
    hits, campaigns = 0, 300
    for seed in range(campaigns):
        above, below = rng.normal(120, 5, 12), rng.normal(100, 5, 12)
        found = ratio_interval(above, below, seed=seed, resamples=1000)
        hits += found.low <= 1.2 <= found.high
    assert 0.90 <= hits / campaigns <= 0.995


def test_drift_compares_the_last_half_with_the_first() -> None:
    assert drift([10, 10, 5, 9, 9]) == pytest.approx(-0.1)
    assert drift([1, 2, 3]) is None


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0], [2.0]]])
def test_nonsense_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite numbers"):
        median(values)


def test_pairs_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="equal lengths"):
        paired_ratio_interval([1, 2], [1, 2, 3])


def test_spread_of_one_value_is_refused() -> None:
    with pytest.raises(ValueError, match="two values"):
        spread([1])
