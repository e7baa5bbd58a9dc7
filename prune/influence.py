"""Plan by block influence: drop the layers that turn the hidden states least. One pass."""

from __future__ import annotations

import itertools

from shortstack.checkpoint import Checkpoint
from shortstack.progress import OnProgress, silent
from shortstack.prune.plan import PrunePlan, Removal
from shortstack.prune.protect import candidates, pick


def influence(
    checkpoint: Checkpoint,
    *,
    drop: int | Removal,
    windows: list[list[int]],
    progress: OnProgress = silent,
    protect_first: int = 1,
    protect_last: int = 1,
    dtype: str = "auto",
) -> PrunePlan:
    """Drop the `drop` layers with the lowest mean Block Influence (scoring.block_influence).

    Scores: 1 - cosine, dimensionless, 0 to 2; every layer has one, protected ones too.
    """
    free = candidates("influence", checkpoint.n_layers, drop, protect_first, protect_last)
    import torch

    from shortstack.prune.calibrate import LayerwiseModel, batches, facts_of
    from shortstack.prune.scoring import block_influence

    parts = batches(windows)
    total, done = checkpoint.n_layers * len(parts), 0
    sums = [0.0] * checkpoint.n_layers
    with torch.inference_mode():
        model = LayerwiseModel(checkpoint, dtype)
        for tokens in parts:
            for index, (before, after) in enumerate(itertools.pairwise(model.states(tokens))):
                sums[index] += block_influence(before, after).item()
                done += 1
                progress(done, total)
    facts = facts_of(model, "1 - cosine", parts)
    scores = tuple(total / facts["tokens"] for total in sums)
    return PrunePlan(checkpoint.n_layers, pick(scores, free, drop), "influence", scores, facts)
