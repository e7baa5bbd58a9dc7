"""How many bits a quantized model takes, before and after its weights are rounded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shortstack.checkpoint import Checkpoint
from shortstack.entropy import entropy_bits
from shortstack.errors import ShortstackError
from shortstack.prune.quantize.matrices import Matrix
from shortstack.prune.quantize.uniform import (
    code_counts,
    nearest_codes,
    stored_steps,
)
from shortstack.row_codes import CODE_MAX, STEP_BITS

TABLE_BITS = 16
"""Of a code's frequency in the table that a decoder needs."""

GROUPS = 8
"""Of rows with a table of their own, as the packed format's ANS coder has."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class MatrixRate:
    """Bits of one matrix: its codes in i.i.d. coders, the coders' tables, a step a row."""

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


def coded_bits(codes: NDArray[np.int8]) -> tuple[float, float, int]:
    """Bits of the codes, more bits a row, and bits of the coders' tables.

    One i.i.d. coder for the matrix, or one for each of GROUPS groups of rows of like spread and a
    byte a row that says which: whichever takes less.
    """
    spreads = np.square(codes, dtype=np.float32).sum(axis=1)
    order = np.argsort(spreads, kind="stable")
    parts = [code_counts(codes[part]) for part in np.array_split(order, GROUPS) if part.size]
    return bits_of_counts(parts, len(codes))


def bits_of_counts(parts: Sequence[NDArray[np.int64]], rows: int) -> tuple[float, float, int]:
    """What `coded_bits` gives, from how often each code occurs in each group of rows."""
    counts = np.sum(parts, axis=0)
    whole = (entropy_bits(counts), 0.0, TABLE_BITS * int((counts > 0).sum()))
    tables = TABLE_BITS * sum(int((part > 0).sum()) for part in parts)
    grouped = (sum(map(entropy_bits, parts)), 8.0, tables)
    return min(whole, grouped, key=lambda bits: bits[0] + bits[1] * rows + bits[2])


def rate_of(name: str, shape: tuple[int, int], codes: NDArray[np.int8], step: float) -> MatrixRate:
    """The rate of a matrix with the codes `codes`, of the shape `shape`."""
    rows, columns = shape
    bits, per_row, tables = coded_bits(codes)
    side = round((STEP_BITS + per_row) * rows) + tables
    zeros = 1 - np.count_nonzero(codes) / codes.size
    return MatrixRate(name, rows * columns, bits, side, zeros, step)


def other_bits(checkpoint: Checkpoint, names: Sequence[str]) -> int:
    """Bits of every tensor that is not quantized, in the type it is stored in."""
    left = set(checkpoint.tensors) - set(names)
    return 8 * sum(checkpoint.tensors[name].n_bytes for name in left)


def predicted_bits(matrix: Matrix, steps: Floats) -> float:
    """Bits of a matrix rounded with `steps`, (rows,), from its sample of rows."""
    stored = stored_steps(steps, matrix.peaks, CODE_MAX)[matrix.sampled]
    bits, per_row, tables = coded_bits(nearest_codes(matrix.sample, stored, CODE_MAX))
    share = matrix.n_weights / matrix.sample.size
    return bits * share + (STEP_BITS + per_row) * matrix.rows + tables


def scale_for(matrices: Sequence[Matrix], units: Mapping[str, Floats], wanted_bits: float) -> float:
    """The factor on the steps `units` with which all matrices together take `wanted_bits`.

    Bisection: a larger step takes fewer bits. Raises ShortstackError where no step is large or
    small enough.
    """

    def bits(log_scale: float) -> float:
        scale = np.float32(math.exp(log_scale))
        return sum(predicted_bits(m, units[m.name] * scale) for m in matrices)

    typical = np.median([float(np.median(m.spreads / units[m.name])) for m in matrices])
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
