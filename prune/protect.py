"""Which layers a scoring method may drop, and the choice of the lowest."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shortstack.errors import ShortstackError
from shortstack.prune.plan import Removal


def candidates(
    method: str, n_layers: int, drop: int | Removal, first: int, last: int
) -> tuple[int, ...]:
    """Layers that may go when the first and the last few are protected.

    Raises ShortstackError for layer numbers instead of a count, and a count that is too large.
    """
    if not isinstance(drop, int):
        raise ShortstackError(
            f"method {method!r} chooses the layers itself: give a count, not layer numbers, or use "
            "method 'explicit'."
        )
    if first < 0 or last < 0:
        raise ShortstackError(f"cannot protect {min(first, last)} layers. Use 0 or more.")
    free = tuple(range(first, n_layers - last))
    if not 1 <= drop <= len(free) or drop == n_layers:
        raise ShortstackError(
            f"cannot drop {drop} of {n_layers} layers: {len(free)} may go (the first {first} and "
            f"last {last} are protected). Ask for 1 to {min(len(free), n_layers - 1)}."
        )
    return free


def pick(
    scores: Sequence[float | None], free: Sequence[int], drop: int | Removal
) -> tuple[int, ...]:
    """The lowest-scored of the layers that may go.

    Raises ShortstackError for scores that are no numbers, which have no order.
    """
    from shortstack.prune.scoring import lowest

    assert isinstance(drop, int)
    unordered = [index for index in free if math.isnan(scores[index] or 0.0)]
    if unordered:
        raise ShortstackError(
            f"the score of layer {unordered[0]} is no number. Use dtype=float32, or other text."
        )
    allowed = set(free)
    masked = [score if index in allowed else None for index, score in enumerate(scores)]
    return lowest(masked, drop)
