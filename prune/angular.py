"""Plan by angular distance: one run, chosen at the last token of each window."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shortstack.checkpoint import Checkpoint
from shortstack.progress import OnProgress, silent
from shortstack.prune.plan import PrunePlan, Removal
from shortstack.prune.runs import plan_run

if TYPE_CHECKING:
    from torch import Tensor


def angular(
    checkpoint: Checkpoint,
    *,
    drop: int | Removal,
    windows: list[list[int]],
    progress: OnProgress = silent,
    protect_first: int = 1,
    protect_last: int = 1,
    dtype: str = "auto",
) -> PrunePlan:
    """Drop the contiguous run of `drop` layers that turns the last token's state least.

    The Unreasonable Ineffectiveness of the Deeper Layers (arXiv:2403.17887), as in
    arcee-ai/PruneMe: scoring.angular_distance averaged over the windows. Scores: that of the run
    that begins at a layer, 0 to 1.
    """
    return plan_run(
        checkpoint,
        "angular",
        "angle of a run / pi",
        _at_last_token,
        drop=drop,
        windows=windows,
        progress=progress,
        protect_first=protect_first,
        protect_last=protect_last,
        dtype=dtype,
    )


def _at_last_token(before: Tensor, after: Tensor) -> Tensor:
    from shortstack.prune.scoring import angular_distance

    return angular_distance(before[:, -1], after[:, -1])
