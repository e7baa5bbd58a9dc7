"""Rounding that knows the inputs: tensors in, tensors out. Nothing of ours is imported."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_COLUMNS = 64
DAMPING = 0.01
"""Of the mean of the diagonal, added to it (GPTQ, arXiv:2210.17323, section 3.3)."""

MOST_TRIES = 40
"""Steps at least double from the second one on: float16 ends before."""

RESTORED_SHARE = 0.5
"""Of what the calibration text says of errors before: another text differs."""


def factor_of(gram: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """The order in which columns are rounded, (columns,), and U, upper triangular, in that order.

    `gram`: H = E[x x^T] of a projection's inputs, (columns, columns). H + damping = (U^T U)^-1, so
    that 1 / U_jj^2 is what is left of column j's power once later columns make up for it. Columns
    of large power come first ("act-order" of GPTQ's code): they have the most columns to be made
    up for by. Computed in float64.
    """
    wide = damped(gram, damping)
    order = wide.diagonal().argsort(descending=True, stable=True)
    wide = wide[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
    return order, torch.linalg.cholesky(inverse, upper=True)


def damped(gram: Tensor, damping: float) -> Tensor:
    """H with a share of its mean power on the diagonal, float64; positive definite for inputs
    that are all zero, too."""
    wide = gram.double().clone()
    wide.diagonal().add_(damping * wide.diagonal().mean().clamp_min(1e-30))
    return wide


def remaining_power(upper: Tensor) -> float:
    """Mean of 1 / U_jj^2: with every step s, compensated rounding leaves E[(e . x)^2] =
    columns * remaining_power * s^2 / 12 a row (QuIP, arXiv:2307.13304: tr D of H = L D L^T)."""
    return float(upper.diagonal().double().pow(-2).mean())


def compensated_codes(
    weights: Tensor,
    steps: Tensor,
    order: Tensor,
    upper: Tensor,
    code_max: int,
    rate_weight: float = 0.0,
) -> Tensor:
    """Codes of `weights`, (rows, columns), rounded column by column; int8 of the same shape.

    What rounding one column does to the outputs, later columns make up for: GPTQ's recursion,
    in blocks. `steps`: (rows,), as stored; `order` and `upper`: see `factor_of`.

    `rate_weight` > 0: of the two nearest codes the smaller one is taken where it saves more bits
    than its error is worth (rate-distortion optimized quantization, as HEVC's reference encoder).
    The error's price is that of a fine uniform quantizer, dD/dR = -ln(2) s^2 / 6, times
    `rate_weight`; bits are those of a Laplace density with the row's mean absolute code.
    """
    return _rounded_columns(weights, steps, order, upper, code_max, rate_weight)[0]


def unclipped_codes(
    weights: Tensor,
    steps: Tensor,
    order: Tensor,
    upper: Tensor,
    code_max: int,
    rate_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`compensated_codes`, none of them clipped, and the steps they are for, (rows,), float16s.

    What a weight makes up for can take it beyond `code_max` steps though the row's peak was within:
    such rows are rounded again with a larger step, until none is.
    """
    codes, largest = _rounded_columns(weights, steps, order, upper, code_max, rate_weight)
    steps = steps.clone()
    for tries in range(MOST_TRIES):
        beyond = (largest > code_max).nonzero()[:, 0]
        if not len(beyond):
            break
        larger = steps[beyond] * (1.01 * 2**tries / code_max) * largest[beyond]
        steps[beyond] = larger.half().float()
        codes[beyond], largest[beyond] = _rounded_columns(
            weights[beyond], steps[beyond], order, upper, code_max, rate_weight
        )
    return codes, steps


def _rounded_columns(
    weights: Tensor,
    steps: Tensor,
    order: Tensor,
    upper: Tensor,
    code_max: int,
    rate_weight: float,
) -> tuple[Tensor, Tensor]:
    """Codes, and the largest of each row before it was cut at `code_max`, (rows,)."""
    left = weights.float().T[order].contiguous()  # a column of the matrix is a row here
    largest = torch.zeros_like(steps)
    upper = upper.float()
    codes = torch.empty(left.shape, dtype=torch.int8, device=left.device)
    dead = rate_weight * _dead_zone(weights, steps) if rate_weight else None
    for start in range(0, len(left), BLOCK_COLUMNS):
        stop = min(len(left), start + BLOCK_COLUMNS)
        block, errors = left[start:stop], torch.empty_like(left[start:stop])
        for at in range(stop - start):
            row = upper[start + at, start:stop]
            chosen = _rounded(block[at] / steps, dead)
            torch.maximum(largest, chosen.abs(), out=largest)
            chosen.clamp_(-code_max, code_max)
            codes[start + at] = chosen
            errors[at] = (block[at] - chosen * steps) / row[at]
            block[at + 1 :].addr_(row[at + 1 :], errors[at], alpha=-1)
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return codes[back].T.contiguous(), largest


def restored(weights: Tensor, gram: Tensor, drift: Tensor) -> Tensor:
    """Weights that make up for what rounding did to the inputs before, (rows, columns).

    W + a W E[(x' - x) x^T] H^-1 is, at a = 1, what comes nearest to the original outputs W x' from
    the inputs x there are (QEP, arXiv:2504.09629; GPTAQ, arXiv:2504.02692);
    a = RESTORED_SHARE. `gram`: H = E[x x^T], damped as in `factor_of`; `drift`: E[(x' - x) x^T].
    """
    factor = torch.linalg.cholesky(damped(gram, DAMPING))
    change = torch.cholesky_solve(drift.double().T, factor).T
    made: Tensor = weights + RESTORED_SHARE * (weights @ change.to(weights.dtype))
    return made


def _dead_zone(weights: Tensor, steps: Tensor) -> Tensor:
    """By how much of a step thresholds move outwards: half of lambda times the bits that one code
    more costs under a Laplace density, 1.4427 / E|q|; (rows,)."""
    typical = (weights.float() / steps[:, None]).abs().mean(1).clamp_min(0.25)
    price = 0.6931471805599453 / 6  # of a bit, in squared steps
    return 0.5 * price * 1.4426950408889634 / typical


def _rounded(exact: Tensor, dead: Tensor | None) -> Tensor:
    if dead is None:
        return exact.round()
    return exact.sign() * (exact.abs() - dead).clamp_min(0).round()


def fitted_steps(weights: Tensor, codes: Tensor, steps: Tensor, gram: Tensor) -> Tensor:
    """The step with which each row's codes come nearest to its outputs, (rows,).

    s = q^T H w / q^T H q, least squares over the inputs whose second moments are `gram`. A row of
    zeros, or one that would get no positive step, keeps its own.
    """
    wide = codes.float()
    through = wide @ gram.float()
    power, along = (through * wide).sum(1), (through * weights.float()).sum(1)
    fitted = along / power.clamp_min(1e-30)
    return torch.where((power > 0) & (fitted > 0), fitted, steps)
