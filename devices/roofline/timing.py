"""Repeat work until its time is used up and keep every sample. Knows nothing of ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

LEAST_SAMPLES = 3
MOST_SAMPLES = 200
TRIES = 6
"""What trying a size takes, in samples: to warm up, to choose a sample's length, two that count."""


@dataclass(frozen=True)
class Products:
    """Samples of square matrix products: `seconds` of one product of `n` x `n` matrices."""

    n: int
    seconds: tuple[float, ...]

    @property
    def flops_per_s(self) -> float:
        """Of the fastest sample; a product of two n x n matrices takes 2 n^3 operations."""
        return 2 * self.n**3 / min(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        return {"n": self.n, "seconds": list(self.seconds)}


def repeat(
    sample: Callable[[], float],
    budget_s: float,
    *,
    least: int = LEAST_SAMPLES,
    most: int = MOST_SAMPLES,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """What `sample` returns, seconds, taken again and again: at least `least` times, at most
    `most`, and no longer than `budget_s` where `least` allows it."""
    begun = clock()
    seconds: list[float] = []
    while len(seconds) < least or (len(seconds) < most and clock() - begun < budget_s):
        seconds.append(sample())
    return seconds


def fastest_products(
    prepare: Callable[[int], Callable[[], float]],
    sizes: Sequence[int],
    budget_s: float,
    *,
    together: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Products:
    """Try ascending `sizes`, then repeat the fastest one until the budget is used.

    `prepare(n)` makes the matrices and returns what takes one sample: seconds a product, of at
    least `together` products. A size that would not fit into the time left, at eight times the
    last size's for a doubling, is not tried: a slow processor stays within its time.
    """
    begun = clock()
    tried: list[Products] = []
    samplers = {}
    for n in sizes:
        left_s = budget_s - (clock() - begun)
        if tried:
            last = tried[-1]
            expected_s = min(last.seconds) * (n / last.n) ** 3
            if TRIES * together * expected_s > left_s:
                break
        samplers[n] = prepare(n)
        samplers[n]()  # the first run plans, packs and raises the clock
        tried.append(Products(n, (samplers[n](), samplers[n]())))
    best = max(tried, key=lambda p: p.flops_per_s)
    more = repeat(samplers[best.n], budget_s - (clock() - begun), clock=clock)
    return Products(best.n, (*best.seconds, *more))
