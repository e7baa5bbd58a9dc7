"""The metrics, on numbers small enough to check by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shortstack.export.verify import Tally, kl_divergence, log_softmax, same_top, surprise

HALF = np.log(np.array([[0.5, 0.5]], np.float32))
SKEWED = np.log(np.array([[0.75, 0.25]], np.float32))


def test_log_softmax_of_huge_logits_is_finite_and_sums_to_one() -> None:
    log_probs = log_softmax(np.array([[1e4, 1e4 - 1, -1e4]], np.float32))
    assert np.isfinite(log_probs).all()
    assert np.exp(log_probs).sum() == pytest.approx(1.0)


def test_kl_is_that_of_the_formula_and_not_symmetric() -> None:
    forward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    backward = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert kl_divergence(HALF, SKEWED)[0] == pytest.approx(forward, rel=1e-5)
    assert kl_divergence(SKEWED, HALF)[0] == pytest.approx(backward, rel=1e-5)
    assert kl_divergence(HALF, HALF)[0] == 0.0


def test_a_constant_on_all_logits_changes_nothing() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    np.testing.assert_allclose(log_softmax(logits + 7), log_softmax(logits), atol=1e-5)


def test_top_token_and_surprise() -> None:
    both = np.concatenate([SKEWED, HALF])
    flipped = both[:, ::-1]
    assert same_top(both, both).all()
    assert not same_top(both, flipped)[0]
    assert surprise(both, np.array([1]))[0] == pytest.approx(math.log(4))


def test_tallies_add_up_to_the_whole() -> None:
    rng = np.random.default_rng(1)
    reference = log_softmax(rng.normal(size=(8, 30)).astype(np.float32))
    candidate = log_softmax(rng.normal(size=(8, 30)).astype(np.float32))
    targets = rng.integers(0, 30, 7)
    whole, first, second = Tally(), Tally(), Tally()
    whole.add(reference, candidate, targets)
    first.add(reference[:3], candidate[:3], targets[:3])
    second.add(reference[3:], candidate[3:], targets[3:])
    both = first + second
    assert both.n == whole.n == 8
    assert both.mean_kl == pytest.approx(whole.mean_kl)
    assert both.perplexity == pytest.approx(whole.perplexity)
    assert (both.top1, both.max_kl) == (whole.top1, whole.max_kl)


def test_uniform_guessing_has_the_perplexity_of_the_vocabulary() -> None:
    uniform = log_softmax(np.zeros((4, 32), np.float32))
    tally = Tally()
    tally.add(uniform, uniform, np.array([1, 2, 3]))
    assert tally.perplexity == pytest.approx(32)


def test_a_nan_never_looks_like_agreement() -> None:
    tally = Tally()
    tally.add(HALF, np.full_like(HALF, np.nan), np.array([0]))
    assert math.isnan(tally.mean_kl)
    assert math.isnan(tally.max_kl)
    assert math.isnan((tally + Tally()).max_kl)
