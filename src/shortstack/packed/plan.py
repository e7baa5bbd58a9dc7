"""Which form each matrix of a packed model is held in: a knapsack of bytes against seconds.

Numbers in, numbers out. For every matrix there are several forms, each with the bytes that it takes
while the model runs and the seconds that a token costs in it. A plan takes one form a matrix. The
plans that no other beats in bytes and in time together make a curve; of a relaxed plan, which may
hold a matrix in two forms by halves, the best is found by taking the steps that save most bytes a
second first (Sinha and Zoltners, Operations Research 27, 1979: the linear relaxation of the
multiple-choice knapsack), and rounding costs at most one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """A form of one matrix: its bytes while the model runs, and seconds a token."""

    form: str
    n_bytes: int
    seconds: float


@dataclass(frozen=True)
class Point:
    """A plan: matrix -> form, what it takes and what a token costs, all matrices together."""

    forms: Mapping[str, str]
    n_bytes: int
    seconds: float


@dataclass(frozen=True)
class _Step:
    """From one form of a matrix to the next on its hull: bytes saved a second spent."""

    matrix: str
    option: Option
    saved: int
    spent: float


def hull(options: Sequence[Option]) -> list[Option]:
    """The forms of one matrix that a plan can want, quickest first: each next takes fewer bytes and
    more seconds, and saves fewer bytes a second than the one before (the lower convex hull).

    >>> forms = [Option("a", 100, 1.0), Option("b", 80, 2.0), Option("c", 50, 2.5)]
    >>> [one.form for one in hull(forms)]
    ['a', 'c']
    """
    kept: list[Option] = []
    for one in sorted(options, key=lambda o: (o.seconds, o.n_bytes)):
        if kept and one.n_bytes >= kept[-1].n_bytes:
            continue
        while len(kept) > 1 and _rate(kept[-2], one) >= _rate(kept[-2], kept[-1]):
            kept.pop()
        kept.append(one)
    return kept


def _rate(slow: Option, small: Option) -> float:
    spent = small.seconds - slow.seconds
    saved = slow.n_bytes - small.n_bytes
    return saved / spent if spent > 0 else float("inf")


def curve(options: Mapping[str, Sequence[Option]]) -> list[Point]:
    """All plans on the relaxed knapsack's optimum, the quickest first, the smallest last."""
    hulls = {name: hull(forms) for name, forms in options.items()}
    forms = {name: steps[0].form for name, steps in hulls.items()}
    n_bytes = sum(steps[0].n_bytes for steps in hulls.values())
    seconds = sum(steps[0].seconds for steps in hulls.values())
    points = [Point(dict(forms), n_bytes, seconds)]
    for step in sorted(_steps(hulls), key=lambda s: s.saved / max(s.spent, 1e-12), reverse=True):
        forms[step.matrix] = step.option.form
        n_bytes, seconds = n_bytes - step.saved, seconds + step.spent
        points.append(Point(dict(forms), n_bytes, seconds))
    return points


def _steps(hulls: Mapping[str, Sequence[Option]]) -> list[_Step]:
    """Along a hull the rates fall, so that sorting them by rate keeps each matrix's own order."""
    return [
        _Step(name, after, before.n_bytes - after.n_bytes, after.seconds - before.seconds)
        for name, forms in hulls.items()
        for before, after in zip(forms, forms[1:], strict=False)
    ]


def smallest_within(points: Sequence[Point], seconds: float) -> Point | None:
    """The plan of fewest bytes that takes at most `seconds`; None where none does."""
    fitting = [point for point in points if point.seconds <= seconds]
    return min(fitting, key=lambda p: (p.n_bytes, p.seconds)) if fitting else None


def quickest_within(points: Sequence[Point], n_bytes: float) -> Point | None:
    """The quickest plan of at most `n_bytes`; None where none is so small."""
    fitting = [point for point in points if point.n_bytes <= n_bytes]
    return min(fitting, key=lambda p: (p.seconds, p.n_bytes)) if fitting else None
