"""Refit: a dropped layer's own MLP, with the down projection that does most of the gap's work."""

from __future__ import annotations

import torch

from shortstack.prune.repair.maps import Map, OwnMlp
from shortstack.prune.repair.statistics import Statistics, regress

RIDGES = (1e-2, 1e-1, 1.0)


def fit(found: Statistics) -> list[tuple[str, Map]]:
    """D = D0 + (A^T A + a I)^-1 A^T (Z - X - A D0): ours, ridge regression to the old weights D0.

    A are the activations of the last dropped layer's MLP on X, without the layer's attention. The
    driver says which layer, and how to compute A.
    """
    assert found.start is not None
    left = found.cross - found.gram @ found.start
    kept: list[tuple[str, Map]] = [("as it was", OwnMlp(-1, found.start))]
    for ridge in RIDGES:
        down: torch.Tensor = found.start + regress(found.gram, left, ridge)
        kept.append((f"ridge {ridge:g}", OwnMlp(-1, down)))
    return kept
