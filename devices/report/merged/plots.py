"""Lines and points as inline SVG: numbers in, markup out; colours are classes `s0` to `s7`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from shortstack.devices.report.charts import line, nice_ticks, svg, text, tick

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 34, 34, 46
COLOURS = 8
CIRCLE = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="5"><title>{}</title></circle>')
Scale = Callable[[float], float]


@dataclass(frozen=True)
class Dot:
    """A point with its interval along y, if known, and the words that show under the pointer."""

    x: float
    y: float
    hint: str
    low: float | None = None
    high: float | None = None
    hollow: bool = False


@dataclass(frozen=True)
class Series:
    """Dots of one colour and number; `joined` by a line."""

    name: str
    dots: tuple[Dot, ...]
    joined: bool = True
    fit: tuple[float, float] | None = None
    """Slope and intercept of a straight line, drawn to the left edge where it is not negative."""


@dataclass(frozen=True)
class Axes:
    """Names of the axes. Both begin at zero, so that half as long is half as much."""

    x: str
    y: str


def chart(title: str, description: str, series: Sequence[Series], axes: Axes) -> Markup:
    """Numbered series; the legend beside the chart tells which is which without colour."""
    dots = [dot for one in series for dot in one.dots]
    ticks_x = nice_ticks(max(dot.x for dot in dots) or 1.0)
    ticks_y = nice_ticks(max(dot.high or dot.y for dot in dots) or 1.0)

    def x(value: float) -> float:
        return LEFT + value / ticks_x[-1] * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / ticks_y[-1] * (HEIGHT - TOP - BOTTOM)

    parts = [line("chart-grid", LEFT, y(t), WIDTH - RIGHT, y(t)) for t in ticks_y]
    parts += [text(LEFT - 6, y(t) + 4, tick(t), "chart-tick", "end") for t in ticks_y]
    parts += [line("chart-grid", x(t), TOP, x(t), HEIGHT - BOTTOM) for t in ticks_x]
    parts += [text(x(t), HEIGHT - BOTTOM + 16, tick(t), "chart-tick", "middle") for t in ticks_x]
    parts.append(text(0, 12, axes.y, "chart-tick"))
    parts.append(text(WIDTH - RIGHT, HEIGHT - 8, axes.x, "chart-tick", "end"))
    for index, one in enumerate(series):
        parts += _series(one, index, x, y)
    return svg(title, description, WIDTH, HEIGHT, parts)


def _series(one: Series, index: int, x: Scale, y: Scale) -> list[Markup]:
    kind = f"s{index % COLOURS}"
    parts = []
    if one.joined:
        where = " ".join(f"{x(dot.x):.1f},{y(dot.y):.1f}" for dot in one.dots)
        dashed = " dashed" if index >= COLOURS else ""
        parts.append(Markup('<polyline class="{}" points="{}"/>').format(kind + dashed, where))
    for dot in one.dots:
        if dot.low is not None and dot.high is not None:
            parts.append(line("whisker", x(dot.x), y(dot.low), x(dot.x), y(dot.high)))
        hollow = " hollow" if dot.hollow else ""
        parts.append(CIRCLE.format(kind + hollow, x(dot.x), y(dot.y), dot.hint))
    last = one.dots[-1]
    if one.fit is not None and one.fit[1] >= 0:
        slope, start = one.fit
        parts.append(
            line(f"fit {kind}", x(0), y(start), x(one.dots[0].x), y(start + slope * one.dots[0].x))
        )
    parts.append(text(x(last.x) + 8, y(last.y) + 4, str(index + 1), "chart-value"))
    return parts
