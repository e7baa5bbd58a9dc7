"""How many bits a quantized model takes, before and after its weights are rounded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.prune.quantize.matrices import Matrix
from shortstack.prune.quantize.uniform import (
    code_counts,
    entropy_bits,
    nearest_codes,
    stored_steps,
)
from shortstack.row_codes import CODE_MAX, STEP_BITS

TABLE_BITS = 16
"""Of a code's frequency in the table that a decoder needs."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class MatrixRate:
    """Bits of one matrix: its codes in one i.i.d. coder, the coder's table, a step a row."""

    name: str
    n_weights: int
    code_bits: float
    side_bits: int
    zeros: float
    step: float
    """The median of the rows'."""

    @property
    def bits_per_weight(self) -> float:
        return (self.code_bits + self.side_bits) / self.n_weights


def rate_of(
    name: str, shape: tuple[int, int], counts: NDArray[np.int64], step: float
) -> MatrixRate:
    """The rate of a matrix whose codes occur `counts` times, (256,) from -128 on."""
    rows, columns = shape
    side = STEP_BITS * rows + TABLE_BITS * int((counts > 0).sum())
    zeros = float(counts[128]) / (rows * columns)
    return MatrixRate(name, rows * columns, entropy_bits(counts), side, zeros, step)


def other_bits(checkpoint: Checkpoint, names: Sequence[str]) -> int:
    """Bits of every tensor that is not quantized, in the type it is stored in."""
    left = set(checkpoint.tensors) - set(names)
    return 8 * sum(checkpoint.tensors[name].n_bytes for name in left)


def predicted_bits(matrix: Matrix, steps: Floats) -> float:
    """Bits of a matrix rounded with `steps`, (rows,), from its sample of rows."""
    stored = stored_steps(steps, matrix.peaks, CODE_MAX)[matrix.sampled]
    counts = code_counts(nearest_codes(matrix.sample, stored, CODE_MAX))
    share = matrix.n_weights / matrix.sample.size
    table = TABLE_BITS * int((counts > 0).sum())
    return entropy_bits(counts) * share + STEP_BITS * matrix.rows + table


def scale_for(
    matrices: Sequence[Matrix],
    units: Mapping[str, Floats],
    wanted_bits: float,
    surplus: Mapping[str, float] | None = None,
) -> float:
    """The factor on the steps `units` with which all matrices together take `wanted_bits`.

    `surplus`: bits a weight that a matrix takes beyond its prediction. Bisection: a larger step
    never takes more bits. Raises ShortstackError where no step is large or small enough.
    """
    extra = sum((surplus or {}).get(m.name, 0.0) * m.n_weights for m in matrices)

    def bits(log_scale: float) -> float:
        scale = np.float32(math.exp(log_scale))
        return extra + sum(predicted_bits(m, units[m.name] * scale) for m in matrices)

    typical = np.median([m.spread / float(np.median(units[m.name])) for m in matrices])
    low, high = math.log(float(typical)) - 6.0, math.log(float(typical)) + 3.0
    most, least = bits(low), bits(high)
    if not least <= wanted_bits <= most:
        n_weights = sum(m.n_weights for m in matrices)
        raise ShortstackError(
            f"the matrices can take {least / n_weights:.2f} to {most / n_weights:.2f} bits a "
            f"weight, not {wanted_bits / n_weights:.2f}. Choose other --bits."
        )
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if bits(middle) > wanted_bits else (low, middle)
    return math.exp((low + high) / 2)
