"""The cost of depth: milliseconds a decoded token against the number of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shortstack.devices.report.merged.cases import Case, Shape
from shortstack.devices.report.merged.gain import families
from shortstack.devices.report.merged.unlike import why_unlike
from shortstack.devices.stats import Interval, median_interval


@dataclass(frozen=True)
class DepthLine:
    """One model at several depths: `points` are (layers, interval of ms a token), by layers.

    `ms_per_layer` and `ms_fixed` are the straight line of least squares through the medians; the
    fixed part is what a token costs beside its layers: embedding, head, launch.
    """

    name: str
    shape: Shape
    points: tuple[tuple[int, Interval], ...]
    ms_per_layer: float
    ms_fixed: float
    left_out: int
    """Cases that were measured under other conditions."""

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(n for n, _ in self.points)


def depth_lines(cases: Sequence[Case]) -> list[DepthLine]:
    """One line a place, runtime and export that was measured at two depths or more."""
    lines = (_line(family) for family in families(cases))
    return [line for line in lines if line is not None]


def straight_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope and intercept of least squares. Needs two different x."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    return slope, mean_y - slope * mean_x


def _line(family: Sequence[Case]) -> DepthLine | None:
    reference = max(family, key=lambda a: sum(not why_unlike(b, a, artifact=False) for b in family))
    kept = [c for c in family if not why_unlike(c, reference, artifact=False)]
    points = sorted(
        ((c.n_layers, median_interval(c.decode_ms)) for c in kept), key=lambda point: point[0]
    )
    if len({layers for layers, _ in points}) < 2:
        return None
    slope, fixed = straight_line([(layers, found.estimate) for layers, found in points])
    first = reference
    name = f"{first.place.name}, {first.runtime}, {first.export}"
    return DepthLine(name, first.shape, tuple(points), slope, fixed, len(family) - len(kept))
