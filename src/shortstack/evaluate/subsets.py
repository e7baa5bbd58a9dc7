"""The rows of a set that are scored: all, or some drawn with a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def subset(rows: Sequence[T], limit: int | None, seed: int) -> tuple[T, ...]:
    """`limit` rows drawn with a seed, in the order of the file; all where there are no more."""
    if limit is None or limit >= len(rows):
        return tuple(rows)
    kept = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return tuple(rows[index] for index in kept)
