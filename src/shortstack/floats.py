"""Stored floats as float32 arrays and back; numpy has no bfloat16, so its bits are handled here."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""safetensors' name of a type -> numpy's; bfloat16 as its bits."""

F16_MAX = 65504.0
F16_LEAST_NORMAL, F16_NORMALS = 0x3880, 0x0EFF
"""2**-14 as bfloat16, and how many bfloat16s above it float16 still holds."""

BLOCK = 2**16
"""Weights at a time: what a core's own cache holds."""


def from_stored(data: bytes, dtype: str) -> NDArray[np.float32]:
    """The numbers in `data` as float32: exact for F32, F16 and BF16."""
    array = np.frombuffer(data, STORED[dtype])
    return from_bfloat16(array) if dtype == "BF16" else array.astype(np.float32)


def to_stored(values: NDArray[np.float32], dtype: str) -> memoryview:
    """The bytes of `values` in another type, rounded to nearest."""
    if dtype == "BF16":
        return to_bfloat16(values).data.cast("B")
    return np.ascontiguousarray(values, STORED[dtype]).data.cast("B")


def from_bfloat16(bits: NDArray[Any]) -> NDArray[np.float32]:
    """A bfloat16 is the upper half of a float32."""
    wide = bits.astype(np.uint32)
    wide <<= 16  # in place: a second array would be as large as the result
    return wide.view(np.float32)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even, on the bits; weights hold no NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bfloat16_to_float16(bits: NDArray[np.uint16]) -> None:
    """Turn bfloat16s into float16s in place, rounded to nearest; `bits` is flat.

    What is normal in both types changes the bias of its exponent (127 to 15) and gets three
    more bits of mantissa: integer arithmetic, several times faster than through float32. The rest
    (small, zero, NaN) goes through float32. Raises OverflowError, with the number as its text, for
    one beyond F16_MAX.
    """
    for start in range(0, bits.size, BLOCK):
        block = bits[start : start + BLOCK]
        sign = block & np.uint16(0x8000)
        block &= 0x7FFF
        block -= F16_LEAST_NORMAL
        others = np.flatnonzero(block > F16_NORMALS)  # smaller ones have wrapped around
        rounded = _rounded((block[others] + np.uint16(F16_LEAST_NORMAL)) | sign[others])
        block <<= 3
        block += 0x0400  # 2**-14 as float16
        block |= sign
        block[others] = rounded


def _rounded(bits: NDArray[np.uint16]) -> NDArray[np.uint16]:
    values = from_bfloat16(bits)
    peak = float(np.abs(values).max(initial=0.0))
    if peak > F16_MAX:
        raise OverflowError(f"{peak:.0f}")
    return values.astype(np.float16).view(np.uint16)
