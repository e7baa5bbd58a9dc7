"""Charts as inline SVG: numbers in, markup out. Colours are classes, so the page's theme rules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH = 460
LEFT = 64
RIGHT = 108
TOP = 6
BAR = 18
GAP = 4
GROUP_HEAD = 21
GROUP_GAP = 13
AXIS = 24


@dataclass(frozen=True)
class Bar:
    """One bar of stacked segments (value, class), a label at its left and words at its end."""

    label: str
    segments: tuple[tuple[float, str], ...]
    text: str
    low: float | None = None
    high: float | None = None
    mark: float | None = None
    """A line across the bar, e.g. what was to be hoped for."""

    @property
    def end(self) -> float:
        return sum(value for value, _ in self.segments)

    @property
    def reach(self) -> float:
        return max(self.end, self.high or 0.0, self.mark or 0.0)


@dataclass(frozen=True)
class Group:
    """Bars under one heading."""

    title: str
    bars: tuple[Bar, ...]

    @property
    def height(self) -> int:
        return GROUP_HEAD + len(self.bars) * (BAR + GAP) + GROUP_GAP


def bar_chart(title: str, description: str, groups: Sequence[Group], unit: str) -> Markup:
    """Horizontal bars from zero, with whiskers where an interval is known."""
    reach = max((bar.reach for group in groups for bar in group.bars), default=0.0) or 1.0
    ticks = nice_ticks(reach)
    bottom = TOP + sum(group.height for group in groups) - GROUP_GAP + 2

    def x(value: float) -> float:
        return LEFT + value / ticks[-1] * (WIDTH - LEFT - RIGHT)

    parts = [line("chart-grid", x(t), TOP + GROUP_HEAD - 4, x(t), bottom) for t in ticks]
    y = float(TOP)
    for group in groups:
        parts.append(text(0, y + 13, group.title, "chart-group"))
        for index, bar in enumerate(group.bars):
            parts += _bar(bar, x, y + GROUP_HEAD + index * (BAR + GAP))
        y += group.height
    parts += [text(x(t), bottom + 15, tick(t), "chart-tick", "middle") for t in ticks]
    parts.append(text(WIDTH, bottom + 15, unit, "chart-tick", "end"))
    return svg(title, description, WIDTH, bottom + AXIS, parts)


def nice_ticks(top: float, about: int = 4) -> list[float]:
    """0 and round steps up to the first at or above `top`."""
    raw = top / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return [i * step for i in range(math.ceil(top / step * 0.999) + 1)]


def number(value: float) -> str:
    """Three significant digits, kept to the last: 1 234, 12.3, 61.0, 0.0120, 1.2e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 999.5:
        return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:#.3g}".rstrip(".")


def tick(value: float) -> str:
    """A round number, without zeros that say nothing: 0.5, 20, 1 500."""
    if abs(value) >= 1000 or value == 0:
        return number(value)
    return f"{value:.0e}" if abs(value) < 1e-3 else f"{value:g}"


def svg(
    title: str, description: str, width: float, height: float, parts: Sequence[Markup]
) -> Markup:
    """A figure that a screen reader names and describes; ids follow from the title."""
    name = re.sub(r"\W+", "-", title.lower()).strip("-")
    return Markup(
        '<svg viewBox="0 0 {w:.0f} {h:.0f}" role="img" aria-labelledby="{id}-t {id}-d">'
        '<title id="{id}-t">{title}</title><desc id="{id}-d">{desc}</desc>{body}</svg>'
    ).format(w=width, h=height, id=name, title=title, desc=description, body=Markup("").join(parts))


def text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, words
    )


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        kind, x1, y1, x2, y2
    )


def rect(kind: str, x: float, y: float, width: float, height: float, hint: str) -> Markup:
    """A box whose `hint` shows under the pointer."""
    return Markup(
        '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="2.5">'
        "<title>{}</title></rect>"
    ).format(kind, x, y, max(0.0, width), height, hint)


def _bar(bar: Bar, x: Callable[[float], float], y: float) -> list[Markup]:
    parts = [text(0, y + 13, bar.label, "chart-label")]
    start, middle = 0.0, y + BAR / 2
    for value, kind in bar.segments:
        left, right = x(start), x(start + value)
        parts.append(rect(f"bar {kind}", left, y, right - left, BAR, f"{bar.label}: {bar.text}"))
        start += value
    if bar.low is not None and bar.high is not None:
        low, high = x(bar.low), x(bar.high)
        parts.append(line("whisker", low, middle, high, middle))
        parts += [line("whisker", at, middle - 4, at, middle + 4) for at in (low, high)]
    if bar.mark is not None:
        parts.append(line("mark", x(bar.mark), y - 3, x(bar.mark), y + BAR + 3))
    parts.append(text(x(bar.reach) + 7, y + 13, bar.text, "chart-value"))
    return parts
