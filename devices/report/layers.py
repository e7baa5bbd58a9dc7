"""One column a layer: how much each was worth, and which were dropped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from shortstack.devices.report.charts import line, nice_ticks, number, rect, svg, text, tick

WIDTH, HEIGHT = 460, 190
LEFT, TOP, BASE = 40, 8, 164
WIDE = 30
"""Scores that differ by more than this factor are drawn on a logarithmic axis."""

Scale = Callable[[float], float]
"""Score -> vertical position."""


def layer_chart(
    title: str, description: str, scores: Sequence[float | None], dropped: Sequence[int]
) -> Markup:
    """Dropped layers in another colour; a layer without a score is a hollow stub."""
    known = [score for score in scores if score is not None]
    y, zero, ticks = _log(known) if is_wide(known) else _linear(known)
    parts = []
    for value in ticks:
        parts.append(line("chart-grid", LEFT, y(value), WIDTH, y(value)))
        parts.append(text(LEFT - 5, y(value) + 4, tick(value), "chart-tick", "end"))
    step = (WIDTH - LEFT) / max(1, len(scores))
    every = next(n for n in (1, 2, 5, 10, 20, 50, 1000) if n * step > 22)
    for index, score in enumerate(scores):
        left = LEFT + index * step
        top = zero - 6 if score is None else y(score)
        parts.append(
            rect(
                f"layer {_kind(index, score, dropped)}",
                left + step * 0.13,
                min(top, zero),
                step * 0.74,
                max(1.5, abs(zero - top)),
                f"layer {index}: {_words(index, score, dropped)}",
            )
        )
        if index % every == 0:
            parts.append(text(left + step / 2, BASE + 17, str(index), "chart-tick", "middle"))
    parts.append(line("chart-axis", LEFT, zero, WIDTH, zero))
    return svg(title, description, WIDTH, HEIGHT, parts)


def is_wide(scores: Sequence[float]) -> bool:
    """Whether a linear axis would flatten most columns."""
    return bool(scores) and min(scores) > 0 and max(scores) / min(scores) > WIDE


def _kind(index: int, score: float | None, dropped: Sequence[int]) -> str:
    if index in dropped:
        return "dropped"
    return "unscored" if score is None else "kept"


def _words(index: int, score: float | None, dropped: Sequence[int]) -> str:
    fate = "dropped" if index in dropped else "kept"
    return f"{fate}, not scored" if score is None else f"{fate}, score {number(score)}"


def _linear(scores: Sequence[float]) -> tuple[Scale, float, list[float]]:
    low, high = min([0.0, *scores]), max([0.0, *scores])
    ticks = nice_ticks(max(high, -low) or 1.0, 3)
    ticks = [t for t in ticks if high > 0 or t == 0] + [-t for t in ticks[1:] if low < 0]
    bottom, top = min(low, 0.0), max(high, *ticks)
    span = (top - bottom) or 1.0

    def y(score: float) -> float:
        return BASE - (score - bottom) / span * (BASE - TOP)

    return y, y(0.0), [t for t in ticks if bottom <= t <= top]


def _log(scores: Sequence[float]) -> tuple[Scale, float, list[float]]:
    low = math.floor(math.log10(min(scores)))
    high = math.ceil(math.log10(max(scores)))

    def y(score: float) -> float:
        return BASE - (math.log10(score) - low) / (high - low) * (BASE - TOP)

    return y, float(BASE), [10.0**power for power in range(low, high + 1)]
