"""Prune&Comp: the dropped layers' mean growth of the hidden state, as one factor."""

from __future__ import annotations

from shortstack.prune.repair.maps import Map, Scale
from shortstack.prune.repair.statistics import Statistics


def fit(found: Statistics) -> list[tuple[str, Map]]:
    """alpha = E|Z| / E|X| (Prune&Comp, arXiv:2507.18212)."""
    return [("magnitude", Scale(found.norm_z / max(found.norm_x, 1e-30)))]
