"""Which units go next, and which are worth training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shortstack.prune.trim.model import Unit

if TYPE_CHECKING:
    from shortstack.prune.trim.scan import Scan
    from shortstack.prune.trim.settings import Settings


def scan_score(accuracy: float, delta: float = 1.0) -> float:
    """s_scan = (100 - a) / ((1 + d^2) + (1 + d) a), a in percent (arXiv:2412.11242, equation 3).

    It falls with the accuracy, whatever d: the order is that of the accuracy after removal.
    """
    a = 100 * accuracy
    return (100 - a) / ((1 + delta**2) + (1 + delta) * a)


def norm_score(norm: float, least: float) -> float:
    """s_norm = 100 min_j |x_j|_F / |x_i|_F (equation 4): lowest for the largest norm."""
    return 100 * least / norm if norm else 100.0


def ranked(found: Scan, units: Sequence[Unit], score: str) -> list[Unit]:
    """Units by what may go first. Equal scores: the later one first."""
    least = min((found.norm[unit] for unit in units), default=0.0)

    def key(unit: Unit) -> tuple[float, ...]:
        norm = norm_score(found.norm[unit], least)
        if score == "norm":
            return (norm,)
        if score == "likelihood":
            return (found.without[unit].nats,)
        sensitivity = scan_score(found.without[unit].accuracy)
        return (sensitivity,) if score == "scan" else (sensitivity, norm)

    return sorted(reversed(units), key=key)


def choose(found: Scan, free: Sequence[Unit], count: int, score: str) -> tuple[Unit, ...]:
    """The `count` units of `free` whose loss is missed least."""
    return tuple(ranked(found, free, score)[:count])


def kept_first(found: Scan, units: Sequence[Unit], settings: Settings) -> tuple[Unit, ...]:
    """The share `ratio` of units most likely kept: those that may not go, then the last to go."""
    protected = [unit for unit in units if unit not in found.without]
    likely = protected + ranked(found, list(found.without), settings.score)[::-1]
    return tuple(sorted(likely[: max(1, round(settings.ratio * len(units)))]))
