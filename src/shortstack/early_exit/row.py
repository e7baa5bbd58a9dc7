"""What a check computes of one row, in plain numbers: a handful is no work for arrays."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, isnan, nan


def row_features(logits: Sequence[float]) -> tuple[float, float, float]:
    """(top, gap, margin) of one row of at least two logits, as `numbers.probability_features` has
    them of many. All are NaN where a logit is, and no score of NaN lets anybody leave."""
    if any(map(isnan, logits)):  # which have no order
        return nan, nan, nan
    first, second = sorted(logits, reverse=True)[:2]
    total = sum(exp(logit - first) for logit in logits)
    top = 1 / total
    return top, top - exp(second - first) / total, first - second
