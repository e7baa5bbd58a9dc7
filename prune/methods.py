"""The planners that need no text: the user's own choice, and controls that look at nothing."""

from __future__ import annotations

import random

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.progress import OnProgress, silent
from shortstack.prune.plan import PrunePlan, Removal
from shortstack.prune.protect import candidates


def explicit(
    checkpoint: Checkpoint,
    *,
    drop: int | Removal,
    windows: list[list[int]],
    progress: OnProgress = silent,
) -> PrunePlan:
    """Drop exactly the named layers and sub-blocks."""
    if isinstance(drop, int):
        raise ShortstackError(
            f"method 'explicit' needs layer numbers, got the count {drop}. "
            "Write e.g. 11-15,20 or choose another method."
        )
    return PrunePlan(
        checkpoint.n_layers, drop.layers, "explicit", attention=drop.attention, mlp=drop.mlp
    )


def every(
    checkpoint: Checkpoint,
    *,
    drop: int | Removal,
    windows: list[list[int]],
    progress: OnProgress = silent,
    protect_first: int = 1,
    protect_last: int = 1,
) -> PrunePlan:
    """Drop `drop` layers at equal distances, as far from the ends as from each other."""
    free = candidates("every", checkpoint.n_layers, drop, protect_first, protect_last)
    assert isinstance(drop, int)
    chosen = tuple(free[(2 * at + 1) * len(free) // (2 * drop)] for at in range(drop))
    return PrunePlan(checkpoint.n_layers, chosen, "every")


def last(
    checkpoint: Checkpoint,
    *,
    drop: int | Removal,
    windows: list[list[int]],
    progress: OnProgress = silent,
    protect_first: int = 1,
    protect_last: int = 1,
) -> PrunePlan:
    """Drop the last `drop` layers before the protected ones."""
    free = candidates("last", checkpoint.n_layers, drop, protect_first, protect_last)
    assert isinstance(drop, int)
    return PrunePlan(checkpoint.n_layers, free[-drop:], "last")


def at_random(
    checkpoint: Checkpoint,
    *,
    drop: int | Removal,
    windows: list[list[int]],
    progress: OnProgress = silent,
    protect_first: int = 1,
    protect_last: int = 1,
    seed: int = 0,
) -> PrunePlan:
    """Drop `drop` layers drawn at random; the same seed draws the same layers."""
    free = candidates("random", checkpoint.n_layers, drop, protect_first, protect_last)
    assert isinstance(drop, int)
    drawn = random.Random(seed).sample(free, drop)
    return PrunePlan(checkpoint.n_layers, tuple(sorted(drawn)), "random", facts={"seed": seed})
