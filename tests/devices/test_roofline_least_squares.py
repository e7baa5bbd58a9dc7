"""The line through measured steps: known laws come back, errors are those of the left out."""

from __future__ import annotations

import numpy as np
import pytest

from shortstack.devices.roofline.least_squares import fit_line, leave_one_out


def test_a_known_law_comes_back() -> None:
    ideal = [0.001, 0.002, 0.004]
    line = fit_line(ideal, [0.0003 + x / 0.8 for x in ideal])
    assert line.overhead_s == pytest.approx(0.0003)
    assert line.efficiency == pytest.approx(0.8)
    assert line.seconds(0.003) == pytest.approx(0.0003 + 0.003 / 0.8)


def test_no_overhead_is_fitted_where_it_would_be_negative_or_cannot_be_told_apart() -> None:
    below = fit_line([1.0, 2.0], [1.0, 2.2])
    alike = fit_line([1.0, 1.0], [1.25, 1.25])
    single = fit_line([1.0], [1.25])
    assert below.overhead_s == alike.overhead_s == single.overhead_s == 0
    assert single.efficiency == alike.efficiency == pytest.approx(0.8)
    assert 2.0 / below.efficiency == pytest.approx(2.1, rel=0.01)


def test_relative_errors_count_so_that_a_slow_device_does_not_outweigh_fast_ones() -> None:
    rng = np.random.default_rng(0)
    ideal = np.array([*np.linspace(0.001, 0.002, 20), 10.0])
    seconds = (0.0005 + ideal / 0.7) * rng.normal(1, 0.001, ideal.size)
    seconds[-1] *= 1.2
    line = fit_line(list(ideal), list(seconds))
    fast = [line.seconds(x) / t - 1 for x, t in zip(ideal[:-1], seconds[:-1], strict=True)]
    assert max(abs(e) for e in fast) < 0.05


@pytest.mark.parametrize(
    ("ideal", "seconds"), [([], []), ([1.0], [0.0]), ([1.0, 2.0], [1.0]), ([float("nan")], [1.0])]
)
def test_nothing_is_fitted_to_what_is_no_time(ideal: list[float], seconds: list[float]) -> None:
    with pytest.raises(ValueError, match="all above 0"):
        fit_line(ideal, seconds)


def test_left_out_groups_show_the_error_and_one_group_shows_none() -> None:
    ideal, seconds = [1.0, 1.0, 1.0], [2.0, 2.0, 1.0]
    assert leave_one_out(ideal, seconds, ["a", "a", "a"]) is None
    errors = leave_one_out(ideal, seconds, ["a", "a", "b"])
    assert errors is not None
    # b, predicted by a: 2 s where 1 s is true, half the rate. a, predicted by b: twice the rate.
    assert errors.relative == pytest.approx((1.0, 1.0, -0.5))
    assert (errors.largest, errors.median) == pytest.approx((1.0, 1.0))
