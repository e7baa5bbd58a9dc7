"""Ghosted Layers: a linear map of the residual stream in place of the dropped layers."""

from __future__ import annotations

from shortstack.prune.repair.maps import Map, Slot
from shortstack.prune.repair.statistics import Statistics, regress

RIDGES = (1e-4, 1e-2, 1e-1)


def fit(found: Statistics) -> list[tuple[str, Map]]:
    """W* = I + (X^T X + e I)^-1 X^T (Z - X) (Ghosted Layers, arXiv:2605.15491), refitted.

    No plain folder holds a matrix on the residual stream, but a layer without attention holds
    Z ~ X + RMSNorm(X) W + c exactly (`slot`): the same least squares with RMSNorm(X) and a
    constant as regressors.
    """
    made: list[tuple[str, Map]] = []
    for ridge in RIDGES:
        solution = regress(found.gram, found.cross, ridge, n_constants=1)
        made.append((f"ridge {ridge:g}", Slot(solution[:-1], solution[-1], found.epsilon)))
    return made
