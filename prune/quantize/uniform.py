"""The numbers behind quantizing: arrays in, arrays out. Nothing of ours is imported."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
LEAST_STEP = 2.0**-24
"""The smallest positive float16."""


def stored_steps(steps: NDArray[np.floating], peaks: NDArray[np.floating], code_max: int) -> Floats:
    """Step sizes as they are stored: float16, and never so small that a code would be clipped.

    `steps` and `peaks` (the largest absolute weight of a row) have shape (rows,). A row whose peak
    lies beyond `code_max` and a half steps gets the smallest float16 with which it does not: one
    huge weight must not be cut (a "super weight", arXiv:2411.07191, can carry a model).
    """
    wanted = np.maximum(steps, LEAST_STEP).astype(np.float16)
    least = (peaks / (code_max + 0.49)).astype(np.float16)
    low = least.astype(np.float64) * (code_max + 0.49) < peaks
    least = np.where(low, np.nextafter(least, np.float16(np.inf)), least)
    stored: Floats = np.maximum(wanted, least).astype(np.float32)
    return stored


def nearest_codes(weights: Floats, steps: Floats, code_max: int) -> NDArray[np.int8]:
    """The nearest multiples of each row's step: int8, shape (rows, columns) as `weights`."""
    codes = np.rint(weights / steps[:, None])
    clipped: NDArray[np.int8] = np.clip(codes, -code_max, code_max, out=codes).astype(np.int8)
    return clipped


def code_counts(codes: NDArray[np.int8]) -> NDArray[np.int64]:
    """How often each code from -128 to 127 occurs, shape (256,)."""
    counts: NDArray[np.int64] = np.bincount(codes.reshape(-1).view(np.uint8), minlength=256)
    return np.roll(counts, 128)


def fitted_steps(weights: Floats, codes: NDArray[np.int8], steps: Floats) -> Floats:
    """The step with which each row's codes are nearest to its weights, in squared error.

    s = <w, q> / <q, q>, shape (rows,); a row of zeros keeps its step.
    """
    wide = codes.astype(np.float32)
    power = np.einsum("rc,rc->r", wide, wide)
    along = np.einsum("rc,rc->r", weights, wide)
    fitted = np.divide(along, power, out=steps.astype(np.float32).copy(), where=power > 0)
    return np.where(fitted > 0, fitted, steps).astype(np.float32)
