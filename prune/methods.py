"""The planner that needs no text: the user says which layers go."""

from __future__ import annotations

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.progress import OnProgress, silent
from shortstack.prune.plan import PrunePlan, Removal


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
