"""How many units go after which round, and when the loop ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shortstack.errors import ShortstackError

if TYPE_CHECKING:
    from shortstack.prune.trim.model import TrimModel, Unit
    from shortstack.prune.trim.settings import Settings, Target


def droppable(model: TrimModel, settings: Settings) -> tuple[Unit, ...]:
    """Units that may go now. Layer 0 keeps its attention (as a block: stays): GGUF's arch for
    sub-blocks cannot lose it, and so the model never becomes empty."""
    n = len(model.layers)
    return tuple(
        unit
        for unit in model.units
        if settings.protect_first <= unit.layer < n - settings.protect_last
        and not (unit.layer == 0 and unit.kind != "mlp")
    )


@dataclass(frozen=True)
class Schedule:
    """`n_drop` units go, in steps; `n_rounds` of tuning in all, the last one after the last drop.

    All three modes tune for the same number of rounds. With an open-ended target (`loss_points`)
    `n_drop` is all that may go and the curve ends the loop.
    """

    settings: Settings
    target: Target
    n_units: int
    n_drop: int
    kept_at: tuple[int, ...]

    @classmethod
    def make(cls, model: TrimModel, settings: Settings, target: Target) -> Schedule:
        n_units, free = len(model.all_units), droppable(model, settings)
        n_drop = _wanted(model, target, free)
        if n_drop > len(free):
            raise ShortstackError(
                f"cannot drop {n_drop} of {n_units} units: {len(free)} may go (layer 0's attention "
                f"and {settings.protect_first} first, {settings.protect_last} last layers stay). "
                f"Keep at least {(n_units - len(free)) / n_units:.2f}."
            )
        shares = [
            share for share in settings.snapshots if round(share * n_units) >= n_units - n_drop
        ]
        kept_at = {n_units - n_drop, *(round(share * n_units) for share in shares)}
        return cls(settings, target, n_units, n_drop, tuple(sorted(kept_at, reverse=True)))

    @property
    def n_rounds(self) -> int:
        return len(self._stops()) + self.settings.last_epochs

    def _stops(self) -> list[int]:
        """Units left at each round of a progressive run: by steps, but no kept depth skipped."""
        stops, step = [self.n_units], self.settings.drop_per_step
        while stops[-1] > self.n_units - self.n_drop:
            below = max(stops[-1] - step, self.n_units - self.n_drop)
            stops.append(max([below, *(left for left in self.kept_at if left < stops[-1])]))
        return stops

    def drops(self, round_number: int, model: TrimModel) -> int:
        """How many units go after this round."""
        left = len(model.units)
        if self.settings.mode == "full":
            return 0
        if self.settings.mode == "one-shot":
            return self.n_drop if round_number == 0 else 0
        return left - max((stop for stop in self._stops() if stop < left), default=left)

    def keeps(self, left: int, curve: Sequence[dict[str, Any]]) -> bool:
        """Whether the model of the round just noted is kept."""
        if self.settings.mode == "full":
            return True
        if self.target.loss_points is not None:
            return not self.missed(curve)
        return left in self.kept_at

    def missed(self, curve: Sequence[dict[str, Any]]) -> bool:
        """Whether the accuracy has fallen below what may be lost."""
        lost, full = self.target.loss_points, self.target.full_accuracy
        if lost is None or full is None or len(curve) < 2:
            return False
        return bool(curve[-1]["accuracy"] < full - lost / 100)

    def ends(self, round_number: int, curve: Sequence[dict[str, Any]]) -> bool:
        return round_number >= self.n_rounds or self.missed(curve)


def _wanted(model: TrimModel, target: Target, free: Sequence[Unit]) -> int:
    """How many units the target takes away at least; for bytes and time as if average ones went."""
    n = len(model.all_units)
    counts = [len(free)] if target.loss_points is not None else []
    if target.keep is not None:
        counts.append(n - round(target.keep * n))
    if target.max_bytes is not None:
        sizes = [
            sum(p.numel() * p.element_size() for p in model.parameters_of(u).values()) for u in free
        ]
        whole = sum(p.numel() * p.element_size() for p in model.hf.parameters())
        counts.append(_count(whole - target.max_bytes, sizes))
    if target.max_latency_ratio is not None:
        seconds = [_seconds(model, unit) for unit in model.all_units]
        counts.append(_count(sum(seconds) * (1 - target.max_latency_ratio), seconds))
    return min(counts) if target.loss_points is not None and len(counts) > 1 else max(counts)


def _count(excess: float, parts: Sequence[float]) -> int:
    """How many average parts make up the excess."""
    mean = sum(parts) / len(parts)
    return max(0, -int(-excess // mean) if mean else 0)


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
