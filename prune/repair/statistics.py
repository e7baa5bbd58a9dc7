"""What the repairs need to know of X and Z at a boundary: sums over tokens in float64."""

from __future__ import annotations

import torch
from torch import Tensor


class Statistics:
    """Sums over tokens at one boundary; memory does not grow with the number of tokens.

    X is the hidden state of the cut and so far repaired model, Z that of the full model behind
    the dropped layers, M the MLP output of the block before. The regressions' rows are multiplied
    by w = 1 / |Z|: a few tokens with massive activations would otherwise decide alone.

    `basis` (width, width) is orthogonal: absolute values are also summed in it. `epsilon` is that
    of the model's RMSNorm. `features` names the regressors A of the second moments: `mlp` (M),
    `normed` (RMSNorm(X) and a constant 1), `own` (what a dropped layer's down projection would
    multiply, had the layer no attention), or none. `start` (features, width) and `offset` (width,)
    are that projection's weight, transposed, and its bias.
    """

    def __init__(
        self,
        width: int,
        *,
        features: str = "",
        basis: Tensor | None = None,
        epsilon: float = 0.0,
        start: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> None:
        size = {"": 0, "mlp": width, "normed": width + 1}.get(features)
        if size is None:
            assert start is not None
            size = len(start)
        self.start, self.offset = start, offset
        self.features, self.epsilon = features, epsilon
        self.basis = None if basis is None else basis.double()
        self.n_tokens = 0
        self.norm_x = self.norm_z = self.weight = 0.0
        """Sums of |X|, |Z| and w^2."""
        self.step, self.weighted_step = _zeros(width), _zeros(width)
        """Sums of Z - X and of w^2 (Z - X)."""
        self.absolute_x, self.absolute_z = _zeros(width), _zeros(width)
        """Sums of |X H| and |Z H|, each coordinate of the basis H apart."""
        self.gram, self.cross = _zeros(size, size), _zeros(size, width)
        """Sums of w^2 A^T A and of w^2 A^T (Z - X); there Z - X is less the offset."""
        self.input_cross = _zeros(size if basis is not None else 0, width)
        """Sum of w^2 A^T X."""

    def add(self, hidden: Tensor, mlp: Tensor | None, target: Tensor) -> None:
        """Add tokens: X, M and Z of shape (..., width); for `own` A in place of M."""
        x, z = (part.flatten(0, -2).double() for part in (hidden, target))
        step, norms = z - x, z.norm(dim=-1)
        weights = norms.clamp_min(1e-12).reciprocal()[:, None]
        self.n_tokens += len(x)
        self.norm_x += x.norm(dim=-1).sum().item()
        self.norm_z += norms.sum().item()
        self.weight += weights.square().sum().item()
        self.step += step.sum(0)
        self.weighted_step += (weights.square() * step).sum(0)
        if self.basis is not None:
            self.absolute_x += (x @ self.basis).abs().sum(0)
            self.absolute_z += (z @ self.basis).abs().sum(0)
        if self.features:
            rows = weights * self._regressors(x, mlp)
            self.gram += rows.T @ rows
            left = step if self.offset is None else step - self.offset
            self.cross += rows.T @ (weights * left)
            if self.basis is not None:
                self.input_cross += rows.T @ (weights * x)

    def _regressors(self, x: Tensor, mlp: Tensor | None) -> Tensor:
        if self.features == "normed":
            return torch.cat([normed(x, self.epsilon), torch.ones(len(x), 1).double()], -1)
        assert mlp is not None
        return mlp.flatten(0, -2).double()


def normed(hidden: Tensor, epsilon: float) -> Tensor:
    """RMSNorm without weight: x / sqrt(mean(x^2) + epsilon)."""
    mean_square: Tensor = hidden.square().mean(-1, keepdim=True)
    return hidden * (mean_square + epsilon).rsqrt()


def regress(gram: Tensor, cross: Tensor, ridge: float, n_constants: int = 0) -> Tensor:
    """(A^T A + a I)^-1 A^T D with a = `ridge` times the mean diagonal of A^T A.

    The last `n_constants` regressors are not held back by the ridge.
    """
    free = len(gram) - n_constants
    penalty = torch.full((len(gram),), ridge * gram.diagonal()[:free].mean().item()).double()
    penalty[free:] = 0.0
    solution: Tensor = torch.linalg.solve(gram + penalty.diag(), cross)
    return solution


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)
