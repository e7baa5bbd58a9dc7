"""Mean bias: the dropped layers' mean step, added to every token."""

from __future__ import annotations

from shortstack.prune.repair.maps import Map, Shift
from shortstack.prune.repair.statistics import Statistics


def fit(found: Statistics) -> list[tuple[str, Map]]:
    """b = E[Z - X] ("emulated update"), and the same with rows weighted by 1 / |Z|."""
    return [
        ("mean", Shift(found.step / found.n_tokens)),
        ("weighted mean", Shift(found.weighted_step / found.weight)),
    ]
