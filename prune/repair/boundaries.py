"""Where a cut left a gap: what the next kept layer gets, and what it should get."""

from __future__ import annotations

from dataclasses import dataclass

from shortstack.prune.plan import PrunePlan


@dataclass(frozen=True)
class Boundary:
    """A gap in front of the cut model's layer `position` (its depth: before the final norm).

    There the cut model has the hidden state X; the original has Z in front of its own layer
    `source`. `dropped` are the whole layers between, by their original numbers; it is empty where
    only a part of the layer before is gone.
    """

    position: int
    source: int
    dropped: tuple[int, ...]


def boundaries(plan: PrunePlan) -> tuple[Boundary, ...]:
    """Every gap of a cut, from the input upwards."""
    changed = {*plan.attention, *plan.mlp, *plan.merge, *plan.replace}
    ends = [-1, *plan.keep, plan.n_layers]
    found = []
    for position, (before, source) in enumerate(zip(ends, ends[1:], strict=False)):
        dropped = tuple(range(before + 1, source))
        if dropped or before in changed:
            found.append(Boundary(position, source, dropped))
    return tuple(found)
