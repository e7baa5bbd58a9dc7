"""ReplaceMe: a linear map of the MLP output before the gap, merged into its down projection."""

from __future__ import annotations

from shortstack.prune.repair.maps import Map, MapOutput
from shortstack.prune.repair.statistics import Statistics, regress

RIDGES = (1e-2, 1.0, 10.0, 100.0)


def fit(found: Statistics) -> list[tuple[str, Map]]:
    """T* = (M^T M + a I)^-1 M^T (Z - Y) (ReplaceMe, arXiv:2505.02819, section 3.1).

    Written as T = I + (M^T M + a I)^-1 M^T (Z - X), with X = Y + M: equal where a = 0, and a
    larger a pulls to no repair instead of to no MLP.
    """
    return [
        (f"ridge {ridge:g}", MapOutput(regress(found.gram, found.cross, ridge))) for ridge in RIDGES
    ]
