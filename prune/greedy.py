"""Plan by greedy search (SLEB): drop the layer that hurts least, look again, drop the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint import Checkpoint
from shortstack.progress import OnProgress, silent
from shortstack.prune.climb import Cut, climb, whole
from shortstack.prune.plan import PrunePlan, Removal
from shortstack.prune.protect import candidates
from shortstack.prune.search import Search, check_screen, greedy_search, plan_of_layers

if TYPE_CHECKING:
    from torch import Tensor

    from shortstack.prune.calibrate import LayerwiseModel

SCREEN = 3
"""Candidates a step: less than a quarter of the layer evaluations of all (docs/methods.md)."""
SCOUT_SHARE = 4
"""The first look at every candidate reads one window in so many."""


def greedy(
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
    """Drop `drop` layers one by one, each time the one whose loss raises perplexity least.

    SLEB (arXiv:2402.09025). `screen`: how many candidates a step tries, those least harmful when
    last tried; 0 tries all, as the paper does. Scores: by how many nats a token a layer's loss
    last raised the loss; a protected layer has none (None).
    """
    free = candidates("greedy", checkpoint.n_layers, drop, protect_first, protect_last)
    check_screen(screen)
    assert isinstance(drop, int)
    pieces = [whole(index) for index in free]
    found, facts = search_by_loss(checkpoint, pieces, drop, windows, screen, dtype, progress)
    return plan_of_layers(found, checkpoint.n_layers, "greedy", facts)


def search_by_loss(
    checkpoint: Checkpoint,
    pieces: Sequence[Cut],
    count: int,
    windows: list[list[int]],
    screen: int,
    dtype: str,
    progress: OnProgress,
) -> tuple[Search, dict[str, Any]]:
    """Greedy search by nats a token on the windows; the search and the facts of it for a plan."""
    import torch

    from shortstack.prune.calibrate import LayerwiseModel, batches, facts_of
    from shortstack.prune.heap import kept_heap
    from shortstack.prune.scoring import perplexity

    parts = batches(windows)
    scout = scout_of(windows)
    with torch.inference_mode(), kept_heap():
        model = LayerwiseModel(checkpoint, dtype)
        hints = first_look(lambda cuts: loss_under(model, scout, cuts), pieces) if screen else {}
        start = loss_under(model, parts, [frozenset()])[0]
        found = greedy_search(
            pieces,
            count,
            lambda cuts: loss_under(model, parts, cuts),
            start=start,
            screen=screen,
            hints=hints,
            step=lambda done: progress(done, count),
        )
    facts = {
        **facts_of(model, "nats per token", parts),
        "screen": screen,
        "candidates_tried": found.tried,
        "whole": start,
        "perplexity": perplexity(found.path[-1][1]),
    }
    return found, facts


def scout_of(windows: list[list[int]]) -> list[Tensor]:
    """Batches of the windows that the first look reads."""
    from shortstack.prune.calibrate import batches

    return batches(windows[: -(-len(windows) // SCOUT_SHARE)])


def first_look(
    evaluate: Callable[[list[Cut]], list[float]], pieces: Sequence[Cut]
) -> dict[Cut, float]:
    """By how much each piece, removed alone, raises the score."""
    start, *scores = evaluate([frozenset(), *pieces])
    return {piece: score - start for piece, score in zip(pieces, scores, strict=True)}


def loss_under(model: LayerwiseModel, parts: Sequence[Tensor], cuts: Sequence[Cut]) -> list[float]:
    """Mean nats a token under each cut; every window weighs the same."""
    sums = [0.0] * len(cuts)
    for tokens in parts:
        for at, (hidden,) in enumerate(climb(model, [tokens], cuts)):
            sums[at] += model.nats(hidden, tokens)
    n_predicted = sum(tokens[:, 1:].numel() for tokens in parts)
    return [nats / n_predicted for nats in sums]
