"""Robust summaries and bootstrap intervals. Arrays in, numbers out; knows nothing of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
Numbers = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval that holds the true value with `confidence`."""

    estimate: float
    low: float
    high: float
    n: int
    confidence: float = 0.95


@dataclass(frozen=True)
class Summary:
    """One sample: `spread` is the standard deviation over the mean (coefficient of variation)."""

    median: float
    p5: float
    p95: float
    spread: float | None
    n: int


def median(values: Numbers) -> float:
    return float(np.median(_array(values)))


def percentile(values: Numbers, q: float) -> float:
    """The q-th percentile, linear between neighbours."""
    return float(np.percentile(_array(values), q))


def spread(values: Numbers) -> float:
    """Coefficient of variation: sample standard deviation over mean. Needs two values."""
    array = _array(values)
    if array.size < 2:
        raise ValueError("spread needs at least two values")
    return float(array.std(ddof=1) / array.mean())


def summarize(values: Numbers) -> Summary:
    array = _array(values)
    return Summary(
        median(array),
        percentile(array, 5),
        percentile(array, 95),
        spread(array) if array.size > 1 else None,
        array.size,
    )


def median_interval(
    values: Numbers, *, seed: int = 0, confidence: float = 0.95, resamples: int = RESAMPLES
) -> Interval:
    """Percentile bootstrap of the median."""
    array = _array(values)
    draws = _resample(array, np.random.default_rng(seed), resamples)
    low, high = _cut(np.median(draws, axis=1), confidence)
    return Interval(median(array), low, high, array.size, confidence)


def ratio_interval(
    above: Numbers,
    below: Numbers,
    *,
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """Ratio of the medians of two independent samples, percentile bootstrap."""
    top, bottom = _array(above), _array(below)
    rng = np.random.default_rng(seed)
    draws = np.median(_resample(top, rng, resamples), axis=1) / np.median(
        _resample(bottom, rng, resamples), axis=1
    )
    low, high = _cut(draws, confidence)
    estimate = median(top) / median(bottom)
    return Interval(estimate, low, high, min(top.size, bottom.size), confidence)


def paired_ratio_interval(
    above: Numbers,
    below: Numbers,
    *,
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """Median of the pairs' ratios, percentile bootstrap over pairs.

    A pair was measured one right after the other, so slow drift (heat, clocks, neighbours)
    multiplies both and leaves the ratio alone.
    """
    top, bottom = _array(above), _array(below)
    if top.size != bottom.size:
        raise ValueError(f"pairs need equal lengths, got {top.size} and {bottom.size}")
    return median_interval(top / bottom, seed=seed, confidence=confidence, resamples=resamples)


def drift(values: Numbers) -> float | None:
    """Median of the last half over that of the first half, minus one; None below four values."""
    array = _array(values)
    half = array.size // 2
    if half < 2:
        return None
    return median(array[-half:]) / median(array[:half]) - 1


def _array(values: Numbers) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError("needs a non-empty row of finite numbers")
    return array


def _resample(
    array: NDArray[np.float64], rng: np.random.Generator, resamples: int
) -> NDArray[np.float64]:
    return array[rng.integers(0, array.size, size=(resamples, array.size))]


def _cut(draws: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    tail = 50 * (1 - confidence)
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)
