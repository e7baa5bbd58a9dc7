"""Plan sub-blocks by what a cut costs after repair: nobody published that combination."""

from __future__ import annotations

from shortstack.checkpoint import Checkpoint
from shortstack.progress import OnProgress, silent
from shortstack.prune.greedy import SCREEN
from shortstack.prune.plan import PrunePlan, Removal
from shortstack.prune.repaired import search_repaired
from shortstack.prune.search import path_facts
from shortstack.prune.sub_block import free_sub_blocks, name_of, plan_of


def repaired_sub_block(
    checkpoint: Checkpoint,
    *,
    drop: int | Removal,
    windows: list[list[int]],
    progress: OnProgress = silent,
    protect_first: int = 1,
    protect_last: int = 1,
    screen: int = SCREEN,
    repair: str = "bias",
    dtype: str = "auto",
) -> PrunePlan:
    """Remove `drop` sub-blocks one by one, each time the one whose loss is mended best.

    As the method repaired, over the pieces of the method sub-block; a repair sits behind the layer
    that lost a sub-block, where its MLP's bias can hold it.
    """
    pieces = free_sub_blocks("repaired-sub-block", checkpoint, drop, protect_first, protect_last)
    found, facts = search_repaired(
        checkpoint, pieces, drop, windows, screen, repair, dtype, progress
    )
    facts["path"] = path_facts(found, name_of)
    return plan_of(checkpoint, "repaired-sub-block", found.cut, facts)
