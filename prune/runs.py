"""Plan a contiguous run of layers, by how little it changes the hidden states. One pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from shortstack.checkpoint import Checkpoint
from shortstack.progress import OnProgress
from shortstack.prune.plan import PrunePlan, Removal
from shortstack.prune.protect import candidates

if TYPE_CHECKING:
    from torch import Tensor

Distance = Callable[["Tensor", "Tensor"], "Tensor"]
"""Hidden states before and after a run, (windows, length, width) -> distances to be averaged."""


def plan_run(
    checkpoint: Checkpoint,
    method: str,
    unit: str,
    distance: Distance,
    *,
    drop: int | Removal,
    windows: list[list[int]],
    progress: OnProgress,
    protect_first: int,
    protect_last: int,
    dtype: str,
) -> PrunePlan:
    """Drop the run of `drop` layers whose mean distance from its input to its output is least.

    Scores: that mean for the run that begins at a layer; None where none can begin. Only `drop`
    and one states of a batch are held at once.
    """
    free = candidates(method, checkpoint.n_layers, drop, protect_first, protect_last)
    import torch

    from shortstack.prune.calibrate import LayerwiseModel, batches, facts_of
    from shortstack.prune.scoring import lowest

    assert isinstance(drop, int)
    starts = free[: len(free) - drop + 1]
    parts = batches(windows)
    total, done = (checkpoint.n_layers + 1) * len(parts), 0
    sums, count = dict.fromkeys(starts, 0.0), 0
    with torch.inference_mode():
        model = LayerwiseModel(checkpoint, dtype)
        for tokens in parts:
            before: deque[Tensor] = deque(maxlen=drop + 1)
            for index, states in enumerate(model.states(tokens)):
                before.append(states)
                start = index - drop
                if start in sums:
                    distances = distance(before[0], states)
                    sums[start] += distances.double().sum().item()
                done += 1
                progress(done, total)
            count += distances.numel()
    scores = tuple(
        sums[index] / count if index in sums else None for index in range(checkpoint.n_layers)
    )
    (first,) = lowest(scores, 1)
    facts = {**facts_of(model, unit, parts), "averaged": count}
    dropped = tuple(range(first, first + drop))
    return PrunePlan(checkpoint.n_layers, dropped, method, scores, facts)
