"""Which chart shows what. Every figure's numbers are also in a table."""

from __future__ import annotations

from collections.abc import Sequence

from shortstack.devices.report.charts import number
from shortstack.devices.report.figures import Figure
from shortstack.devices.report.merged.cases import Shape
from shortstack.devices.report.merged.depth import DepthLine
from shortstack.devices.report.merged.front import Front, Point
from shortstack.devices.report.merged.plots import COLOURS, Axes, Dot, Series, chart

MOST_FRONTS = 6
"""So many fronts are drawn; the table has all."""
READABLE = 10.0
"""Lines of one chart differ by no more than this factor."""


def figures(
    lines: Sequence[DepthLine], fronts: Sequence[Front], metric: str | None
) -> list[Figure]:
    shapes = dict.fromkeys(line.shape for line in lines)
    drawn = [
        cost_of_depth(shape, part)
        for shape in shapes
        for part in _of_one_size([line for line in lines if line.shape == shape])
    ]
    bought = (pareto(front, metric) for front in fronts[:MOST_FRONTS])
    return drawn + [figure for figure in bought if figure is not None]


def _of_one_size(lines: Sequence[DepthLine]) -> list[list[DepthLine]]:
    """Slowest first; a line much lower than the first of its chart would lie on the axis there."""
    parts: list[list[DepthLine]] = []
    for line in sorted(lines, key=_top, reverse=True):
        if not parts or _top(line) * READABLE < _top(parts[-1][0]):
            parts.append([])
        parts[-1].append(line)
    return parts


def _top(line: DepthLine) -> float:
    return max(found.estimate for _, found in line.points)


def cost_of_depth(shape: Shape, lines: Sequence[DepthLine]) -> Figure:
    """Layers against milliseconds a token, one line a device, runtime and format."""
    title = f"Cost of depth: {shape.words}, up to {number(_top(lines[0]))} ms"
    series = [
        Series(
            line.name,
            tuple(
                Dot(
                    layers,
                    found.estimate,
                    f"{line.name}, {layers} layers: {number(found.estimate)} ms",
                    found.low,
                    found.high,
                )
                for layers, found in line.points
            ),
            fit=(line.ms_per_layer, line.ms_fixed),
        )
        for line in lines
    ]
    said = "; ".join(
        f"{line.name}: "
        + ", ".join(f"{n} layers {number(found.estimate)} ms" for n, found in line.points)
        for line in lines
    )
    note = (
        "Time of a decode step against the number of layers; whiskers: 95 % interval. Where "
        "the dotted line meets the left edge is what a token costs beside its layers."
    )
    image = chart(title, said, series, Axes("layers", "ms a token"))
    return Figure(title, note, image, _legend([line.name for line in lines]))


def pareto(front: Front, metric: str | None) -> Figure | None:
    """Speed against quality, or against memory where no quality is known; filled: on the front.

    What is not judged is not drawn. None where neither is known: speed alone needs no picture.
    """
    judged = [p for p in front.points if p.left_out is None]
    quality = metric if any(p.verdict for p in judged) else None
    points = [(p, at) for p in judged if (at := _height(p, quality)) is not None]
    if not points:
        return None
    title = f"Best buys on {front.place.name}: {front.shape.words}"
    series = [
        Series(
            p.case.title,
            (Dot(p.decode_tokens_per_s, at, _said(p, quality), hollow=p not in front.best),),
            joined=False,
        )
        for p, at in points
    ]
    note = f"Filled: nothing else is better in {', '.join(front.judged_by)} at once. "
    if quality is None:
        note += (
            "No quality figure is known here, so quality is not judged: give shortstack report "
            "an evaluation with --eval. "
        )
    if len(points) < len(front.points):
        note += f"{len(front.points) - len(points)} not judged: see the table."
    axes = Axes("decode, tokens/s", quality or "peak memory, MB")
    image = chart(title, "; ".join(_said(p, quality) for p, _ in points), series, axes)
    names = [f"{p.case.title}, {p.case.runtime}" for p, _ in points]
    return Figure(title, note.strip(), image, _legend(names))


def _height(point: Point, quality: str | None) -> float | None:
    if quality is not None:
        return None if point.verdict is None else point.verdict.value
    return None if point.peak_bytes is None else point.peak_bytes / 1e6


def _said(point: Point, quality: str | None) -> str:
    words = [f"{point.case.title} in {point.case.runtime}"]
    words.append(f"{number(point.decode_tokens_per_s)} tokens/s")
    if quality is not None and point.verdict is not None:
        words.append(f"{quality} {number(point.verdict.value)}")
    if point.peak_bytes is not None:
        words.append(f"{number(point.peak_bytes / 1e6)} MB")
    return ", ".join(words)


def _legend(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    return tuple((f"s{i % COLOURS}", f"{i + 1} {name}") for i, name in enumerate(names))
