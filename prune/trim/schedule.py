"""How many units go after which round, and when the loop ends."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shortstack.errors import ShortstackError

if TYPE_CHECKING:
    from shortstack.prune.trim.model import TrimModel, Unit
    from shortstack.prune.trim.settings import Settings, Target


def droppable(model: TrimModel, settings: Settings) -> tuple[Unit, ...]:
    """Units that may go now."""
    return may_go(model.units, len(model.layers), settings)


def may_go(units: Iterable[Unit], n_layers: int, settings: Settings) -> tuple[Unit, ...]:
    """Those of `units` that may go. Layer 0 keeps its attention (as a block: stays): GGUF's arch
    for sub-blocks cannot lose it, and so the model never becomes empty."""
    return tuple(
        unit
        for unit in units
        if settings.protect_first <= unit.layer < n_layers - settings.protect_last
        and not (unit.layer == 0 and unit.kind != "mlp")
    )


@dataclass(frozen=True)
class Schedule:
    """At most `n_drop` units go, in steps; the last round of tuning comes after the last drop.

    All modes tune for the same number of rounds. With a target in accuracy or in costs `n_drop` is
    all that may go and the loop ends when the target is met; `n_expected` is then the number of
    average units that would meet it, by which the controls count their rounds. `costs` of the units
    are bytes or seconds, of which at most `budget` may be left.
    """

    settings: Settings
    target: Target
    n_units: int
    n_drop: int
    n_expected: int
    costs: Mapping[Unit, float]
    budget: float

    @classmethod
    def make(
        cls,
        model: TrimModel,
        settings: Settings,
        target: Target,
        costs: Mapping[Unit, float] | None = None,
    ) -> Schedule:
        """`costs`: those that the same run measured before it was killed."""
        n_units, free = len(model.all_units), droppable(model, settings)
        costs = (costs or measured(model, target)) if target.costs else {}
        budget = _budget(model, target, costs)
        n_drop = check_target(n_units, free, settings, target, costs, budget)
        mean = sum(costs.values()) / n_units
        excess = sum(costs.values()) - budget
        n_expected = min(n_drop, math.ceil(excess / mean - 1e-6)) if costs else n_drop
        return cls(settings, target, n_units, n_drop, max(0, n_expected), costs, budget)

    @property
    def kept_at(self) -> frozenset[int]:
        """Units left where a model is kept: at the end, and at the snapshots that lie above it."""
        least = self.n_units - self.n_drop
        snapshots = {round(share * self.n_units) for share in self.settings.snapshots}
        return frozenset({least, *(left for left in snapshots if left >= least)})

    @property
    def n_rounds(self) -> int:
        progressive = self.settings.mode == "progressive"
        n_drop = self.n_drop if progressive else self.n_expected
        return len(self._stops(n_drop)) + self.settings.last_epochs

    def _stops(self, n_drop: int) -> list[int]:
        """Units left at each round of a progressive run: by steps, but no kept depth skipped."""
        stops, step, least = [self.n_units], self.settings.drop_per_step, self.n_units - n_drop
        while stops[-1] > least:
            below = max(stops[-1] - step, least)
            kept = (left for left in self.kept_at if least <= left < stops[-1])
            stops.append(max([below, *kept]))
        return stops

    def met(self, units: Iterable[Unit]) -> bool:
        """Whether these units cost no more than the target allows; False without such a target."""
        return bool(self.costs) and sum(self.costs[unit] for unit in units) <= self.budget

    def drops(self, round_number: int, model: TrimModel) -> int:
        """How many units go after this round, at most."""
        left = len(model.units)
        if self.settings.mode == "full" or self.met(model.units):
            return 0
        if self.settings.mode == "one-shot":
            return self.n_drop if round_number == 0 else 0
        return left - max((stop for stop in self._stops(self.n_drop) if stop < left), default=left)

    def enough(self, dropped: Sequence[Unit], model: TrimModel) -> Sequence[Unit]:
        """As many of `dropped`, from the front, as it takes to meet a target in costs."""
        for count in range(1, len(dropped)):
            if self.met(unit for unit in model.units if unit not in dropped[:count]):
                return dropped[:count]
        return dropped

    def keeps(self, model: TrimModel, curve: Sequence[dict[str, Any]]) -> bool:
        """Whether the model of the round just noted is kept."""
        if self.settings.mode == "full":
            return True
        if self.target.loss_points is not None:
            return not self.missed(curve)
        return len(model.units) in self.kept_at or self.met(model.units)

    def missed(self, curve: Sequence[dict[str, Any]]) -> bool:
        """Whether the accuracy has fallen below what may be lost."""
        lost, full = self.target.loss_points, self.target.full_accuracy
        if lost is None or full is None or len(curve) < 2:
            return False
        return bool(curve[-1]["accuracy"] < full - lost / 100)

    def ends(self, round_number: int, model: TrimModel, curve: Sequence[dict[str, Any]]) -> bool:
        """Whether no round follows; one does after every drop."""
        if round_number >= self.n_rounds or self.missed(curve):
            return True
        rested = sum(row["left"] == len(model.units) for row in curve)
        progressive = self.settings.mode == "progressive"
        return progressive and self.met(model.units) and rested > self.settings.last_epochs


def check_target(
    n_units: int,
    free: Sequence[Unit],
    settings: Settings,
    target: Target,
    costs: Mapping[Unit, float],
    budget: float,
) -> int:
    """How many units go at most, of the `free` ones. Raises ShortstackError where the target is
    not met when all of them go; `costs` is empty where it is none in costs."""
    n_drop = len(free) if target.keep is None else n_units - round(target.keep * n_units)
    least = (n_units - len(free)) / n_units
    if n_drop > len(free):
        raise _too_deep(f"cannot drop {n_drop} of {n_units} units: {len(free)} may go", least)
    if not free and target.keep is None and settings.mode != "full":
        raise _too_deep(f"none of {n_units} units may go", least)
    if sum(costs.values()) - sum(costs[unit] for unit in free if costs) > budget:
        raise _too_deep("the target is not met when all goes that may", least)
    return n_drop


def measured(model: TrimModel, target: Target) -> dict[Unit, float]:
    """What each unit costs: bytes, or seconds where the target is in time."""
    if target.max_bytes is None:
        return {unit: _seconds(model, unit) for unit in model.all_units}
    return {
        unit: float(sum(p.numel() * p.element_size() for p in model.parameters_of(unit).values()))
        for unit in model.all_units
    }


def _budget(model: TrimModel, target: Target, costs: Mapping[Unit, float]) -> float:
    """What the units that are left may cost; the embeddings and norms always stay."""
    if target.max_bytes is not None:
        whole = sum(p.numel() * p.element_size() for p in model.hf.parameters())
        return float(target.max_bytes - (whole - sum(costs.values())))
    return sum(costs.values()) * (target.max_latency_ratio or 1.0)


def _too_deep(what: str, least: float) -> ShortstackError:
    return ShortstackError(
        f"{what}. Layer 0's attention stays, and what is protected: keep at least {least:.2f}."
    )


def _seconds(model: TrimModel, unit: Unit, length: int = 64) -> float:
    """The shortest of five calls of a unit on one row of `length` ids."""
    import torch

    with torch.inference_mode(), model.autocast():
        hidden = model.embed(torch.ones(1, length, dtype=torch.long, device=model.device))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            model.call(unit, hidden)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return min(times)
