"""Plan by leave-one-out perplexity: drop the layers whose loss hurts the text least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from shortstack.checkpoint import Checkpoint
from shortstack.progress import OnProgress, silent
from shortstack.prune.climb import climb, whole
from shortstack.prune.plan import PrunePlan, Removal
from shortstack.prune.protect import candidates, pick

if TYPE_CHECKING:
    from torch import Tensor

    from shortstack.prune.calibrate import LayerwiseModel


def perplexity(
    checkpoint: Checkpoint,
    *,
    drop: int | Removal,
    windows: list[list[int]],
    progress: OnProgress = silent,
    protect_first: int = 1,
    protect_last: int = 1,
    dtype: str = "auto",
) -> PrunePlan:
    """Drop the `drop` layers that, each left out alone, raise the loss least.

    Scores: nats per token above the whole model's; a protected layer has none (None).
    """
    free = candidates("perplexity", checkpoint.n_layers, drop, protect_first, protect_last)
    import torch

    from shortstack.prune.calibrate import LayerwiseModel, batches, facts_of
    from shortstack.prune.scoring import perplexity as as_perplexity
    from shortstack.prune.scoring import suffix_evaluations

    parts = batches(windows)
    total = suffix_evaluations(checkpoint.n_layers, free) * len(parts)
    nats, without = 0.0, dict.fromkeys(free, 0.0)
    with torch.inference_mode():
        model = LayerwiseModel(checkpoint, dtype)
        for tokens in parts:
            base, left_out = leave_one_out(
                model, tokens, free, lambda: progress(model.evaluations, total)
            )
            nats += base
            for index, harmed in zip(free, left_out, strict=True):
                without[index] += harmed
    n_predicted = sum(tokens[:, 1:].numel() for tokens in parts)
    scores = tuple(
        (without[index] - nats) / n_predicted if index in without else None
        for index in range(checkpoint.n_layers)
    )
    facts = {
        **facts_of(model, "nats per token", parts),
        "tokens": n_predicted,
        "perplexity": as_perplexity(nats / n_predicted),
    }
    return PrunePlan(checkpoint.n_layers, pick(scores, free, drop), "perplexity", scores, facts)


def leave_one_out(
    model: LayerwiseModel,
    tokens: Tensor,
    free: Sequence[int],
    step: Callable[[], None] = lambda: None,
) -> tuple[float, list[float]]:
    """Summed nats of the whole model and, for each layer of `free`, of the model without it.

    Below a dropped layer nothing changes, so its hidden states are shared (climb.climb). `step` is
    called after each evaluation of a layer.
    """
    from shortstack.prune.heap import kept_heap

    with kept_heap():
        cuts = [frozenset(), *(whole(index) for index in free)]
        ends = climb(model, [tokens], cuts, step=step)
        nats = [model.nats(hidden, tokens) for (hidden,) in ends]
    return nats[0], nats[1:]
