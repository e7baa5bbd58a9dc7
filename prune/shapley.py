"""Plan by sampled Shapley values: what a layer's loss costs on average over orders of removal."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.progress import OnProgress, silent
from shortstack.prune.climb import Cut, whole
from shortstack.prune.greedy import loss_under
from shortstack.prune.plan import PrunePlan, Removal
from shortstack.prune.protect import candidates, pick

if TYPE_CHECKING:
    from torch import Tensor

    from shortstack.prune.calibrate import LayerwiseModel


def shapley(
    checkpoint: Checkpoint,
    *,
    drop: int | Removal,
    windows: list[list[int]],
    progress: OnProgress = silent,
    protect_first: int = 1,
    protect_last: int = 1,
    permutations: int = 8,
    depth: int = 0,
    seed: int = 0,
    dtype: str = "auto",
) -> PrunePlan:
    """Drop the `drop` layers with the lowest Shapley value, estimated from random orders.

    Siddiqui et al. (arXiv:2407.16286): the players are the layers that may go, the
    value of a coalition is minus the loss, and a layer's marginal is the loss without it minus the
    loss with it. In each of `permutations` orders every layer has one marginal. `depth` layers at
    most are gone at once, then the walk begins anew from the whole model: marginals in models
    that are broken anyway say little. 0 means `drop`; the number of free layers gives the
    textbook's value. Scores: nats a token; a protected layer has none (None).
    """
    free = candidates("shapley", checkpoint.n_layers, drop, protect_first, protect_last)
    assert isinstance(drop, int)
    if permutations < 1 or depth < 0:
        raise ShortstackError(
            f"cannot walk {permutations} permutations to depth {depth}. Use 1 permutation or more, "
            "and a depth of 0 (as many as are dropped) or more."
        )
    import torch

    from shortstack.prune.calibrate import LayerwiseModel, batches, facts_of
    from shortstack.prune.heap import kept_heap

    walks = [
        walk
        for order in draw_orders(free, permutations, seed)
        for walk in pieces_of(order, depth or drop)
    ]
    parts = batches(windows)
    marginals: dict[int, list[float]] = {index: [] for index in free}
    with torch.inference_mode(), kept_heap():
        model = LayerwiseModel(checkpoint, dtype)
        start = loss_under(model, parts, [frozenset()])[0]
        for done, walk in enumerate(walks, 1):
            for layer, marginal in zip(walk, _marginals(model, parts, walk, start), strict=True):
                marginals[layer].append(marginal)
            progress(done, len(walks))
    values = {layer: sum(found) / len(found) for layer, found in marginals.items()}
    scores = tuple(values.get(index) for index in range(checkpoint.n_layers))
    facts = {
        **facts_of(model, "nats per token", parts),
        "permutations": permutations,
        "depth": depth or drop,
        "seed": seed,
        "whole": start,
    }
    return PrunePlan(checkpoint.n_layers, pick(scores, free, drop), "shapley", scores, facts)


def draw_orders(free: Sequence[int], permutations: int, seed: int) -> list[list[int]]:
    """Random orders of the layers that may go; the same seed draws the same ones."""
    source = random.Random(seed)
    return [source.sample(list(free), len(free)) for _ in range(permutations)]


def pieces_of(order: Sequence[int], depth: int) -> list[Sequence[int]]:
    """Cut an order into walks of at most `depth` layers."""
    return [order[at : at + depth] for at in range(0, len(order), depth)]


def _marginals(
    model: LayerwiseModel, parts: Sequence[Tensor], walk: Sequence[int], start: float
) -> list[float]:
    """How much the loss rises at each step of a walk that begins at the whole model."""
    cuts: list[Cut] = [whole(*walk[: at + 1]) for at in range(len(walk))]
    losses = [start, *loss_under(model, parts, cuts)]
    return [after - before for before, after in zip(losses, losses[1:], strict=False)]
