"""Plan by greedy search over sub-blocks (BlockPruner): attention and MLP go one by one."""

from __future__ import annotations

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.families.table import PARTS
from shortstack.progress import OnProgress, silent
from shortstack.prune.climb import Cut
from shortstack.prune.greedy import SCREEN, search_by_loss
from shortstack.prune.plan import PrunePlan, Removal
from shortstack.prune.protect import candidates
from shortstack.prune.search import check_screen, path_facts


def sub_block(
    checkpoint: Checkpoint,
    *,
    drop: int | Removal,
    windows: list[list[int]],
    progress: OnProgress = silent,
    protect_first: int = 1,
    protect_last: int = 1,
    screen: int = SCREEN,
    dtype: str = "auto",
) -> PrunePlan:
    """Remove `drop` sub-blocks one by one, each time the one that raises perplexity least.

    BlockPruner (arXiv:2406.10594). A layer that loses both of its sub-blocks is
    dropped. `screen` as for the method greedy. The attention of layer 0 stays in any case: GGUF
    (arch deci) reads the size of a head from it.
    """
    pieces = free_sub_blocks("sub-block", checkpoint, drop, protect_first, protect_last)
    check_screen(screen)
    assert isinstance(drop, int)
    found, facts = search_by_loss(checkpoint, pieces, drop, windows, screen, dtype, progress)
    facts["path"] = path_facts(found, name_of)
    return plan_of(checkpoint, "sub-block", found.cut, facts)


def free_sub_blocks(
    method: str, checkpoint: Checkpoint, drop: int | Removal, protect_first: int, protect_last: int
) -> list[Cut]:
    """The sub-blocks that may go, each as a cut of its own.

    Raises ShortstackError for layer numbers instead of a count, and for a count that is too large.
    """
    n_layers = checkpoint.n_layers
    within = 1 if isinstance(drop, int) else drop
    free = candidates(method, n_layers, within, protect_first, protect_last)
    pieces: list[Cut] = [
        frozenset({(layer, part)})
        for layer in free
        for part in PARTS
        if layer not in checkpoint.removed.get(part, ()) and (layer, part) != (0, "attention")
    ]
    assert isinstance(drop, int)
    if not 1 <= drop <= len(pieces):
        raise ShortstackError(
            f"cannot remove {drop} of {2 * n_layers} sub-blocks: {len(pieces)} may go (the first "
            f"{protect_first} and last {protect_last} layers are protected, and layer 0's "
            f"attention). Ask for 1 to {len(pieces)}."
        )
    return pieces


def plan_of(checkpoint: Checkpoint, method: str, cut: Cut, facts: dict[str, object]) -> PrunePlan:
    """A plan for a cut: layers of which nothing is left are dropped whole."""
    lost = {part: {layer for layer, gone in cut if gone == part} for part in PARTS}
    bare = {part: lost[part] | set(checkpoint.removed.get(part, ())) for part in PARTS}
    empty = bare["attention"] & bare["mlp"]
    return PrunePlan(
        checkpoint.n_layers,
        tuple(sorted(empty)),
        method,
        facts=facts,
        attention=tuple(sorted(lost["attention"] - empty)),
        mlp=tuple(sorted(lost["mlp"] - empty)),
    )


def name_of(piece: Cut) -> str:
    ((layer, part),) = piece
    return f"{layer}.{part}"
