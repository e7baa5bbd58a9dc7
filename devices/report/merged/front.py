"""Which artifacts no other beats: quality, speed and memory at once, one place and work a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shortstack.devices.report.merged.cases import Case, Shape
from shortstack.devices.report.merged.machines import Place
from shortstack.devices.report.merged.merge import Merged
from shortstack.devices.report.merged.quality import Verdict
from shortstack.devices.report.merged.unlike import why_unlike
from shortstack.devices.stats import median


@dataclass(frozen=True)
class Point:
    """A case with what it costs; `beaten_by` names those that are nowhere worse and better once."""

    case: Case
    decode_tokens_per_s: float
    peak_bytes: float | None
    verdict: Verdict | None
    beaten_by: tuple[str, ...] = ()
    left_out: str | None = None
    """Why it is not judged."""

    @property
    def costs(self) -> tuple[float, ...]:
        """Smaller is better in each."""
        known = (self.verdict.cost if self.verdict else None, self.peak_bytes)
        return (-self.decode_tokens_per_s, *(value for value in known if value is not None))


@dataclass(frozen=True)
class Front:
    """The points of one place and shape; `judged_by` names the axes in force."""

    place: Place
    shape: Shape
    points: tuple[Point, ...]
    judged_by: tuple[str, ...]

    @property
    def best(self) -> tuple[Point, ...]:
        return tuple(p for p in self.points if not p.beaten_by and p.left_out is None)


def fronts(merged: Merged) -> list[Front]:
    """One front a place and shape with at least two points, most points first."""
    groups: dict[tuple[Place, Shape], list[Case]] = {}
    for case in merged.measured:
        groups.setdefault((case.place, case.shape), []).append(case)
    made = [
        _front(merged, place, shape, cases)
        for (place, shape), cases in groups.items()
        if len(cases) > 1
    ]
    return sorted(made, key=lambda front: -len(front.points))


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Nowhere larger and smaller at least once."""
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _front(merged: Merged, place: Place, shape: Shape, cases: Sequence[Case]) -> Front:
    points = [
        Point(case, median(case.decode_tokens_per_s), case.peak_bytes, merged.verdict(case))
        for case in cases
    ]
    with_quality = any(p.verdict for p in points)
    with_memory = any(p.peak_bytes is not None for p in points)
    axes = ["decode speed"]
    axes += [merged.quality.metric] if with_quality and merged.quality else []
    axes += ["peak memory"] if with_memory else []
    likes = _most_alike(cases)
    sorted_out = [
        _left_out(p, with_quality, with_memory, why_unlike(p.case, likes, artifact=False))
        for p in points
    ]
    judged = [p for p in sorted_out if p.left_out is None]
    return Front(
        place,
        shape,
        tuple(p if p.left_out else _judged(p, judged) for p in sorted_out),
        tuple(axes),
    )


def _most_alike(cases: Sequence[Case]) -> Case:
    """The case that most others may be compared with, whatever the runtime."""
    return max(
        cases, key=lambda a: sum(not _apart(why_unlike(b, a, artifact=False)) for b in cases)
    )


def _apart(reasons: Sequence[str]) -> list[str]:
    """A choice of runtime is one of the things to choose between; the rest is not."""
    return [reason for reason in reasons if not reason.startswith("other runtime")]


def _left_out(point: Point, with_quality: bool, with_memory: bool, reasons: Sequence[str]) -> Point:
    why = "; ".join(_apart(reasons))
    if not why and with_quality and point.verdict is None:
        why = "no quality figure"
    if not why and with_memory and point.peak_bytes is None:
        why = "no memory figure"
    return Point(**{**vars(point), "left_out": why or None})


def _judged(point: Point, points: Sequence[Point]) -> Point:
    several = len({p.case.run for p in points}) > 1
    beaten_by = tuple(
        f"{p.case.title} in {p.case.runtime}" + (f", run {p.case.run}" if several else "")
        for p in points
        if p is not point and dominates(p.costs, point.costs)
    )
    return Point(**{**vars(point), "beaten_by": beaten_by})
