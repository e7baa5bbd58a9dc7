"""Metrics against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shortstack.evaluate import metrics


def test_the_least_nats_win_and_the_first_of_equals() -> None:
    assert metrics.chosen([3.0, 1.0, 2.0]) == 1
    assert metrics.chosen([2.0, 2.0]) == 0


def test_by_length_a_long_choice_is_not_held_against_itself() -> None:
    assert metrics.chosen([4.0, 6.0]) == 0
    assert metrics.chosen_by_length([4.0, 6.0], [2, 12]) == 1


def test_wilson_is_the_published_interval() -> None:
    # Newcombe 1998, table I: 81 of 263
    found = metrics.wilson(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    assert metrics.wilson(0, 10).low == 0
    assert metrics.wilson(10, 10).high == 1
    with pytest.raises(ValueError, match="no rows"):
        metrics.wilson(0, 0)


def test_chance_and_majority() -> None:
    assert metrics.chance([2, 4, 4]) == pytest.approx(1 / 3)
    assert metrics.majority([0, 0, 2, 1]) == 0.5


def test_macro_f1_counts_a_class_that_is_never_named() -> None:
    # class 0: tp 2, fp 1, fn 0: 4/5; class 1: tp 0, fn 1: 0; class 2: tp 1: 1
    assert metrics.macro_f1([0, 0, 1, 2], [0, 0, 0, 2]) == pytest.approx((0.8 + 0 + 1) / 3)
    assert metrics.macro_f1([1, 1], [1, 1]) == 1


def test_a_bootstrap_holds_its_estimate_and_repeats_with_its_seed() -> None:
    values = np.random.default_rng(1).normal(5, 1, 200)

    def mean(rows: np.ndarray) -> float:
        return float(values[rows].mean())

    found = metrics.bootstrap(mean, 200, seed=3)
    assert found == metrics.bootstrap(mean, 200, seed=3)
    assert found != metrics.bootstrap(mean, 200, seed=4)
    # the normal interval of a mean: half width 1.96 s / sqrt n
    half = 1.96 * values.std() / math.sqrt(200)
    assert found.estimate == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


def test_perplexity_weighs_windows_by_their_tokens() -> None:
    found = metrics.perplexity([math.log(2) * 10, math.log(8) * 5], [10, 5])
    assert found.estimate == pytest.approx(2 ** ((10 + 15) / 15))
    assert found.low == pytest.approx(2)
    assert found.high == pytest.approx(8)
    assert metrics.perplexity([1e6], [1]).estimate == math.inf


def test_stability_weighs_questions_by_how_the_original_tells_options_apart() -> None:
    # nats 1 and 3: standard deviation 1; 2 and 2: 0; softmax(1, 0)
    weights = metrics.stability_weights([[1.0, 3.0], [2.0, 2.0]])
    sure = math.e / (math.e + 1)
    np.testing.assert_allclose(weights, [sure, 1 - sure])
    assert metrics.stability(weights, [True, False], [True, True]) == pytest.approx(sure)
    assert metrics.stability(weights, [True, False], [False, False]) == pytest.approx(1 - sure)
    assert metrics.stability(weights, [True, False], [True, False]) == pytest.approx(1)
    # perplexities 1 and 3: standard deviation 1
    weights = metrics.stability_weights([[0.0, math.log(3)], [1.5, 1.5]], exp=True)
    np.testing.assert_allclose(weights, [sure, 1 - sure])


def test_weights_survive_enormous_perplexities_and_tell_how_many_rows_they_stand_for() -> None:
    weights = metrics.stability_weights([[2000.0, 1.0], [1.0, 1.5]], exp=True)
    np.testing.assert_allclose(weights, [1, 0])
    assert metrics.effective_n(weights) == 1
    assert metrics.effective_n(np.full(4, 0.25)) == 4


def test_paired_difference_counts_the_rows_where_two_models_differ() -> None:
    first = [True] * 12 + [False] * 8
    second = [True] * 4 + [False] * 8 + [True] * 1 + [False] * 7
    found = metrics.paired_difference(first, second)
    assert found.estimate == pytest.approx(-7 / 20)
    assert (found.only_first, found.only_second) == (8, 1)
    # two-sided binomial: 2 (C(9,0) + C(9,1)) / 2^9
    assert found.p_value == pytest.approx(20 / 512)
    assert found.low <= found.estimate <= found.high < 0
    assert metrics.mcnemar(0, 0) == 1
    assert metrics.mcnemar(3, 3) == 1


def test_kl_divergence_is_that_of_two_coins() -> None:
    coins = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    found = metrics.kl_divergence(coins, coins[::-1])
    by_hand = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert found[0] == pytest.approx(by_hand, rel=1e-5)
    assert metrics.kl_divergence(coins, coins).sum() == 0
