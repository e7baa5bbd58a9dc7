"""Plan by first-order importance (Shortened LLaMA): the loss's slope along each layer's weights."""

from __future__ import annotations

from shortstack.checkpoint import Checkpoint
from shortstack.progress import OnProgress, silent
from shortstack.prune.plan import PrunePlan, Removal
from shortstack.prune.protect import candidates, pick


def taylor(
    checkpoint: Checkpoint,
    *,
    drop: int | Removal,
    windows: list[list[int]],
    progress: OnProgress = silent,
    protect_first: int = 1,
    protect_last: int = 1,
    dtype: str = "float32",
) -> PrunePlan:
    """Drop the `drop` layers with the lowest sum of |w * dL/dw| (scoring.taylor_importance).

    L is the mean loss of all windows; one forward and one backward pass, window by window, with
    one gradient as large as the layers. Scores: nats a token; every layer has one.
    """
    free = candidates("taylor", checkpoint.n_layers, drop, protect_first, protect_last)
    import torch

    from shortstack.prune.calibrate import LayerwiseModel, batches, facts_of
    from shortstack.prune.scoring import taylor_importance

    parts = [window for tokens in batches(windows) for window in tokens.split(1)]
    model = LayerwiseModel(checkpoint, dtype)
    model.freeze()
    weights = [model.matrices(index) for index in range(model.n_layers)]
    for matrix in (matrix for layer in weights for matrix in layer):
        matrix.requires_grad_(True)
    with torch.enable_grad():
        for done, window in enumerate(parts, 1):
            (model.loss(window) / len(parts)).backward()
            progress(done, len(parts))
    with torch.no_grad():
        scores = tuple(
            taylor_importance(layer, [matrix.grad for matrix in layer if matrix.grad is not None])
            for layer in weights
        )
    # Every layer once forward, and twice as much work backward.
    facts = {**facts_of(model, "nats per token", parts), "layer_evaluations": 3 * model.n_layers}
    return PrunePlan(checkpoint.n_layers, pick(scores, free, drop), "taylor", scores, facts)
