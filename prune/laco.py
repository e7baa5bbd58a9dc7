"""Plan by layer collapse (LaCo): add what later layers do differently to an earlier one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.progress import OnProgress, silent
from shortstack.prune.plan import PrunePlan, Removal
from shortstack.prune.protect import candidates

if TYPE_CHECKING:
    from torch import Tensor

    from shortstack.prune.calibrate import LayerwiseModel

THRESHOLD_STEP = 0.05
Layers = list[tuple[int, dict[int, float]]]
"""The layers that are left: the original number, and the weights of the originals in it."""


def laco(
    checkpoint: Checkpoint,
    *,
    drop: int | Removal,
    windows: list[list[int]],
    progress: OnProgress = silent,
    protect_first: int = 1,
    protect_last: int = 1,
    merge: int = 4,
    interval: int = 1,
    threshold: float = 0.75,
    dtype: str = "auto",
) -> PrunePlan:
    """Merge layers from the top down until `drop` are gone: LaCo (arXiv:2402.11187).

    `merge` layers at a time become one (scoring.merged_weights) if the last hidden state then has
    a mean cosine above `threshold` with the whole model's, and the sweep goes on `interval` layers
    below; if not, one below. The paper takes what a threshold gives; to reach a count the sweep is
    repeated with a threshold 0.05 lower each time, and the last merge is as small as needed.
    `path` records each merge. Layers have no scores.
    """
    free = candidates("laco", checkpoint.n_layers, drop, protect_first, protect_last)
    assert isinstance(drop, int)
    if merge < 2 or interval < 1:
        raise ShortstackError(
            f"cannot merge {merge} layers at intervals of {interval}. Use 2 layers or more, and an "
            "interval of 1 or more."
        )
    if drop == len(free):
        raise ShortstackError(
            f"cannot merge all {drop} layers that may go away: one of them has to take the others "
            f"in. Ask for 1 to {drop - 1}."
        )
    import torch

    from shortstack.prune.calibrate import LayerwiseModel, batches, facts_of
    from shortstack.prune.heap import kept_heap

    parts = batches(windows)
    path: list[dict[str, Any]] = []
    with torch.inference_mode(), kept_heap():
        model = LayerwiseModel(checkpoint, dtype)
        layers: Layers = [(index, {index: 1.0}) for index in range(model.n_layers)]
        wanted = [model.final(states[-1]) for states in _climb(model, parts, layers)]
        bar = threshold + THRESHOLD_STEP
        while (missing := drop - (checkpoint.n_layers - len(layers))) > 0:
            bar -= THRESHOLD_STEP
            progress(drop - missing, drop)
            sweep = _Sweep(model, parts, wanted, set(free), merge - 1, interval, bar)
            layers = sweep.down(layers, missing, path)
    facts = {
        **facts_of(model, "cosine of the last hidden state", parts),
        "merge": merge,
        "threshold": round(bar, 4),
        "path": path,
    }
    kept = {index for index, _ in layers}
    return PrunePlan(
        checkpoint.n_layers,
        tuple(index for index in range(checkpoint.n_layers) if index not in kept),
        "laco",
        facts=facts,
        merge={index: weights for index, weights in layers if weights != {index: 1.0}},
    )


@dataclass(frozen=True)
class _Sweep:
    """One way down through the layers, with one threshold."""

    model: LayerwiseModel
    parts: Sequence[Tensor]
    wanted: Sequence[Tensor]
    free: set[int]
    followers: int
    interval: int
    threshold: float

    def down(self, layers: Layers, missing: int, path: list[dict[str, Any]]) -> Layers:
        """The layers after all merges that pass, at most `missing` fewer; notes them in `path`.

        Merges only change what is above, so the states below are computed once a sweep.
        """
        below = _climb(self.model, self.parts, layers)
        at = self._highest(layers)
        while missing and at >= 0 and layers[at][0] in self.free:
            taken = min(self.followers, missing, self._n_above(layers, at))
            trial = merged(layers, at, taken)
            likeness = self._likeness([states[at] for states in below], trial, at)
            if likeness > self.threshold or self.threshold < -1:
                gone = [index for index, _ in layers[at + 1 : at + 1 + taken]]
                path.append({"into": layers[at][0], "drop": gone, "score": likeness})
                layers, missing = trial, missing - taken
                at = min(at - self.interval, self._highest(layers))
            else:
                at -= 1
        return layers

    def _n_above(self, layers: Layers, at: int) -> int:
        return sum(index in self.free for index, _ in layers[at + 1 :])

    def _highest(self, layers: Layers) -> int:
        """The highest position with enough layers above it, or the lowest that may go."""
        free = [at for at, (index, _) in enumerate(layers) if index in self.free]
        return free[max(0, len(free) - 1 - self.followers)]

    def _likeness(self, states: Sequence[Tensor], layers: Layers, start: int) -> float:
        """Mean cosine with the whole model's last state, of layers that begin at these states."""
        from torch.nn import functional

        total = 0.0
        for hidden, wanted in zip(states, self.wanted, strict=True):
            for index, weights in layers[start:]:
                hidden = _run(self.model, index, weights, hidden)
            cosines = functional.cosine_similarity(
                self.model.final(hidden).float(), wanted.float(), dim=-1
            )
            total += cosines.double().sum().item()
        return total / sum(len(wanted) for wanted in self.wanted)


def merged(layers: Layers, at: int, taken: int) -> Layers:
    """The layers after the one at position `at` has taken in the `taken` ones above it."""
    from shortstack.prune.scoring import merged_weights

    index, weights = layers[at]
    others = [other for _, other in layers[at + 1 : at + 1 + taken]]
    return [*layers[:at], (index, merged_weights(weights, others)), *layers[at + 1 + taken :]]


def _climb(model: LayerwiseModel, parts: Sequence[Tensor], layers: Layers) -> list[list[Tensor]]:
    """For each batch the states before each layer, and those after the last."""
    climbed = []
    for tokens in parts:
        states = [model.embed(tokens)]
        for index, weights in layers:
            states.append(_run(model, index, weights, states[-1]))
        climbed.append(states)
    return climbed


def _run(model: LayerwiseModel, index: int, weights: dict[int, float], hidden: Tensor) -> Tensor:
    tensors = None if weights == {index: 1.0} else model.blend(weights)
    return model.layer(index, hidden, tensors=tensors)
