"""Plan by leave-one-out perplexity: drop the layers whose loss hurts the text least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from shortstack.checkpoint import Checkpoint
from shortstack.progress import OnProgress, silent
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

    from shortstack.prune.calibrate import LayerwiseModel, batches
    from shortstack.prune.scoring import perplexity as as_perplexity
    from shortstack.prune.scoring import suffix_evaluations

    parts = batches(windows)
    total = suffix_evaluations(checkpoint.n_layers, free) * len(parts)
    whole, without = 0.0, dict.fromkeys(free, 0.0)
    with torch.inference_mode():
        model = LayerwiseModel(checkpoint, dtype)
        for tokens in parts:
            base, left_out = leave_one_out(
                model, tokens, free, lambda: progress(model.evaluations, total)
            )
            whole += base
            for index, nats in zip(free, left_out, strict=True):
                without[index] += nats
    n_predicted = sum(tokens[:, 1:].numel() for tokens in parts)
    scores = tuple(
        (without[index] - whole) / n_predicted if index in without else None
        for index in range(checkpoint.n_layers)
    )
    facts = {
        "unit": "nats per token",
        "tokens": n_predicted,
        "dtype": str(model.dtype).split(".")[1],
        "perplexity": as_perplexity(whole / n_predicted),
        "layer_evaluations": model.evaluations,
    }
    return PrunePlan(checkpoint.n_layers, pick(scores, free, drop), "perplexity", scores, facts)


def leave_one_out(
    model: LayerwiseModel,
    tokens: Tensor,
    free: Sequence[int],
    step: Callable[[], None] = lambda: None,
) -> tuple[float, list[float]]:
    """Summed nats of the whole model and, for each layer of `free`, of the model without it.

    Below a dropped layer nothing changes, so its hidden states are shared: all variants climb
    the layers together, and the variant without layer i joins at layer i with the whole model's
    states. Layer by layer, not variant by variant: a layer's weights stay in the cache.
    """
    from shortstack.prune.heap import kept_heap

    with kept_heap():
        whole = model.embed(tokens)
        variants: list[Tensor] = []
        for index in range(model.n_layers):
            below = whole
            whole = model.layer(index, whole)
            step()
            for at, hidden in enumerate(variants):
                variants[at] = model.layer(index, hidden)
                step()
            if index in free:
                variants.append(below)
        return model.nats(whole, tokens), [model.nats(hidden, tokens) for hidden in variants]
