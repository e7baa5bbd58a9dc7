"""Plan by cosine similarity: one run, chosen over all tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shortstack.checkpoint import Checkpoint
from shortstack.progress import OnProgress, silent
from shortstack.prune.plan import PrunePlan, Removal
from shortstack.prune.runs import plan_run

if TYPE_CHECKING:
    from torch import Tensor


def cosine_run(
    checkpoint: Checkpoint,
    *,
    drop: int | Removal,
    windows: list[list[int]],
    progress: OnProgress = silent,
    protect_first: int = 1,
    protect_last: int = 1,
    dtype: str = "auto",
) -> PrunePlan:
    """Drop the contiguous run of `drop` layers whose input and output are most alike.

    LLM-Streamline (arXiv:2403.19135): the largest mean cosine over all tokens.
    Scores: 1 - that mean for the run that begins at a layer, 0 to 2.
    """
    return plan_run(
        checkpoint,
        "cosine-run",
        "1 - cosine of a run",
        _at_all_tokens,
        drop=drop,
        windows=windows,
        progress=progress,
        protect_first=protect_first,
        protect_last=protect_last,
        dtype=dtype,
    )


def _at_all_tokens(before: Tensor, after: Tensor) -> Tensor:
    from torch.nn import functional

    return 1 - functional.cosine_similarity(before.float(), after.float(), dim=-1)
