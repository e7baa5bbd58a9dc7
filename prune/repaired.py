"""Plan by what a cut costs after repair: greedy by KL to the whole model, mended at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint import Checkpoint
from shortstack.progress import OnProgress, silent
from shortstack.prune.boundary import Fit, crossed, repair_named
from shortstack.prune.climb import Cut, climb, whole
from shortstack.prune.greedy import SCREEN, first_look, scout_of
from shortstack.prune.plan import PrunePlan, Removal
from shortstack.prune.protect import candidates
from shortstack.prune.search import Search, check_screen, greedy_search, plan_of_layers

if TYPE_CHECKING:
    from torch import Tensor

    from shortstack.prune.calibrate import LayerwiseModel


def repaired(
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
    """Drop `drop` layers one by one, each time the one whose loss is mended best.

    How good a cut is: the mean KL divergence from the whole model's next-token distribution
    (FinerCut, arXiv:2405.18218, scores by the output, too), after a cheap `repair` wherever the
    cut ends (boundary.REPAIRS): a layer that a repair can stand in for may go, whatever its loss
    does unrepaired. A first look on a quarter of the windows ranks all candidates; each step
    tries the `screen` least harmful of them on all windows (0: all). The repairs are only for
    the score; the plan drops layers. Scores: by how many nats a token the loss of a layer last
    raised the divergence; a protected layer has none (None).
    """
    free = candidates("repaired", checkpoint.n_layers, drop, protect_first, protect_last)
    pieces = [whole(index) for index in free]
    found, facts = search_repaired(
        checkpoint, pieces, drop, windows, screen, repair, dtype, progress
    )
    return plan_of_layers(found, checkpoint.n_layers, "repaired", facts)


def search_repaired(
    checkpoint: Checkpoint,
    pieces: Sequence[Cut],
    drop: int | Removal,
    windows: list[list[int]],
    screen: int,
    repair: str,
    dtype: str,
    progress: OnProgress,
) -> tuple[Search, dict[str, Any]]:
    """Greedy search by KL after repair; the search and the facts of it for a plan."""
    check_screen(screen)
    fit = repair_named(repair)
    assert isinstance(drop, int)
    import torch

    from shortstack.prune.calibrate import LayerwiseModel, batches, facts_of
    from shortstack.prune.heap import kept_heap

    parts = batches(windows)
    with torch.inference_mode(), kept_heap():
        model = LayerwiseModel(checkpoint, dtype)
        hints: dict[Cut, float] = {}
        if screen:
            hints = first_look(Judge.of(model, scout_of(windows), fit).divergence, pieces)
        found = greedy_search(
            pieces,
            drop,
            Judge.of(model, parts, fit).divergence,
            start=0.0,
            screen=screen,
            hints=hints,
            step=lambda done: progress(done, drop),
        )
    facts = {
        **facts_of(model, "nats of KL per token", parts),
        "repair": repair,
        "screen": screen,
        "candidates_tried": found.tried,
    }
    return found, facts


@dataclass(frozen=True)
class Judge:
    """The whole model's states on a text, to mend cuts by and to compare their logits with.

    `states` are one list of batches for each place: before each layer, and before the final norm.
    They take (layers + 1) * tokens * width numbers of the model's type.
    """

    model: LayerwiseModel
    parts: Sequence[Tensor]
    fit: Fit
    states: Sequence[Sequence[Tensor]]

    @classmethod
    def of(cls, model: LayerwiseModel, parts: Sequence[Tensor], fit: Fit) -> Judge:
        by_batch = [list(model.states(tokens)) for tokens in parts]
        return cls(model, parts, fit, list(zip(*by_batch, strict=True)))

    def divergence(self, cuts: Sequence[Cut]) -> list[float]:
        """Mean KL to the whole model under each cut, mended, in nats a token."""
        ends = climb(self.model, self.parts, cuts, mend=self._mend)
        sums = [0.0] * len(cuts)
        for batch, reference in enumerate(self.states[-1]):
            final = self.model.final(reference)
            found = self.model.divergences(final, [states[batch] for states in ends])
            sums = [total + one for total, one in zip(sums, found, strict=True)]
        n_predicted = sum(tokens[:, 1:].numel() for tokens in self.parts)
        return [total / n_predicted for total in sums]

    def _mend(self, place: int, arriving: list[Tensor]) -> list[Tensor]:
        return crossed(self.fit, arriving, self.states[place])
