"""The time of a decode step as overhead plus bytes over bandwidth. Numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Line:
    """`t = overhead_s + ideal_s / efficiency`; `ideal_s` is bytes over bandwidth."""

    overhead_s: float
    efficiency: float

    def seconds(self, ideal_s: float) -> float:
        return self.overhead_s + ideal_s / self.efficiency


@dataclass(frozen=True)
class Errors:
    """Predicted over measured rate, minus 1, of everything that was left out of its own fit."""

    relative: tuple[float, ...]

    @property
    def largest(self) -> float:
        return max(abs(e) for e in self.relative)

    @property
    def median(self) -> float:
        return float(np.median(np.abs(self.relative)))


def fit_line(ideal_s: Sequence[float], seconds: Sequence[float]) -> Line:
    """Least squares of the relative errors: a slow device must not outweigh a fast one.

    Where the best overhead is below 0, or all `ideal_s` are the same, there is none: then the
    efficiency alone is fitted. Raises ValueError for no points and for times that are not above 0.
    """
    x, t = np.asarray(ideal_s, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    if x.size == 0 or x.shape != t.shape or not (np.isfinite(x * t).all() and (x * t > 0).all()):
        raise ValueError("a fit needs as many ideal times as measured ones, all above 0")
    # Each row of [1, x] [overhead, slope] = t is divided by its t.
    rows = np.stack([1 / t, x / t], axis=1)
    if float(np.ptp(x)) > 1e-6 * float(x.max()):
        overhead, slope = np.linalg.lstsq(rows, np.ones_like(t), rcond=None)[0]
        if overhead >= 0 and slope > 0:
            return Line(float(overhead), float(1 / slope))
    ratio = rows[:, 1]
    return Line(0.0, float((ratio**2).sum() / ratio.sum()))


def leave_one_out(
    ideal_s: Sequence[float], seconds: Sequence[float], groups: Sequence[Hashable]
) -> Errors | None:
    """Errors where each group is predicted by a fit of all others; None for a single group."""
    relative = []
    for left in dict.fromkeys(groups):
        rest = [i for i, group in enumerate(groups) if group != left]
        if not rest:
            return None
        line = fit_line([ideal_s[i] for i in rest], [seconds[i] for i in rest])
        out = [i for i, group in enumerate(groups) if group == left]
        relative += [seconds[i] / line.seconds(ideal_s[i]) - 1 for i in out]
    return Errors(tuple(relative))
