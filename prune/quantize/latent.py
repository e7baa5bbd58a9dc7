"""Codes that learn: the arithmetic of latent codes. Tensors in, tensors out."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

START_REACH = 0.45
"""How far from its code a latent code starts at most, of a step."""

BLOCK_CODES = 2**24
"""Counted at once: the index of each takes 8 bytes."""


def latent_start(weights: Tensor, codes: Tensor, steps: Tensor) -> Tensor:
    """Latent codes u, (rows, columns), that round to `codes` and lie towards `weights` / `steps`.

    Compensated codes are often not the nearest ones: their latent codes start near the threshold
    to the code that the original weight has, from where one good reason brings them back.
    """
    start = codes.float()
    return start.add_((weights / steps[:, None] - start).clamp_(-START_REACH, START_REACH))


def codes_of(latent: Tensor, code_max: int) -> Tensor:
    """The codes, float32, that latent codes stand for."""
    return latent.round().clamp_(-code_max, code_max)


def latent_gradients(
    gradient: Tensor, weights: Tensor, steps: Tensor, factors: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the latent codes, (rows, columns), and of the rows' factors, (rows,).

    `gradient`: of `weights` = round(u) * `steps`, overwritten. Rounding passes gradients as if it
    were not there (straight-through estimator, Bengio et al., arXiv:1308.3432), so that
    dL/du = dL/dW * step; `steps` are proportional to `factors`, so that the factor's is
    sum_columns(dL/dW * W) / factor.
    """
    of_factors = torch.einsum("rc,rc->r", gradient, weights) / factors
    return gradient.mul_(steps[:, None]), of_factors


def grouped_counts(codes: Tensor, groups: int) -> NDArray[np.int64]:
    """How often each code from -128 to 127 occurs in each of `groups` groups of rows of like
    spread, (groups, 256); `codes`: int8, (rows, columns). As many rows a group, the first ones one
    more; groups without a row are left out."""
    rows_at_once = max(1, BLOCK_CODES // codes.shape[1])
    squares = [part.float().square_().sum(1) for part in codes.split(rows_at_once)]
    order = torch.cat(squares).argsort(stable=True)
    group = torch.empty_like(order)
    for number, rows in enumerate(order.tensor_split(groups)):
        group[rows] = number
    counts = torch.zeros(groups * 256, dtype=torch.int64, device=codes.device)
    for part, of_part in zip(codes.split(rows_at_once), group.split(rows_at_once), strict=True):
        at = part.long().add_(128).add_(of_part[:, None] * 256)
        counts += torch.bincount(at.flatten(), minlength=groups * 256)
    found: NDArray[np.int64] = counts.view(groups, 256).cpu().numpy()
    used: NDArray[np.int64] = found[found.sum(axis=1) > 0]
    return used
