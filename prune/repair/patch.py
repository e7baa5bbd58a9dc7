"""LinearPatch: one factor for each coordinate of a rotated basis, at every gap."""

from __future__ import annotations

import torch
from torch import Tensor

from shortstack.prune.repair.maps import Map, Slot
from shortstack.prune.repair.statistics import Statistics, regress

RIDGES = (1e-4, 1e-2)
SEED = 0


def fit(found: Statistics) -> list[tuple[str, Map]]:
    """P = H diag(d) H^T, d_k = mean|Z_k| / mean|X_k| in the basis H (LinearPatch,
    arXiv:2505.24680), refitted as X + RMSNorm(X) W + c ~ X P: see `ghost`.
    """
    assert found.basis is not None
    change = patch(found) - torch.eye(len(found.basis)).double()
    made: list[tuple[str, Map]] = []
    for ridge in RIDGES:
        solution = regress(found.gram, found.input_cross @ change, ridge, n_constants=1)
        made.append((f"ridge {ridge:g}", Slot(solution[:-1], solution[-1], found.epsilon)))
    return made


def patch(found: Statistics) -> Tensor:
    """The matrix P, (width, width), symmetric."""
    assert found.basis is not None
    factors = found.absolute_z / found.absolute_x.clamp_min(1e-30)
    return found.basis @ factors.diag() @ found.basis.T


def basis(width: int) -> Tensor:
    """An orthogonal matrix that spreads massive activations over coordinates, float64.

    A Hadamard matrix where `width` is a power of two; else the Kronecker product of a seeded
    random orthogonal matrix of the odd part and a Hadamard matrix of the rest.
    """
    made, rest = torch.ones(1, 1).double(), width
    while rest % 2 == 0:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)]) / 2**0.5
        rest //= 2
    if rest == 1:
        return made
    random = torch.randn(rest, rest, generator=torch.Generator().manual_seed(SEED)).double()
    return torch.kron(torch.linalg.qr(random).Q.contiguous(), made)
