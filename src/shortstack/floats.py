"""Stored floats as float32 arrays and back; numpy has no bfloat16, so its bits are handled here."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""safetensors' name of a type -> numpy's; bfloat16 as its bits."""


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
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even, on the bits; weights hold no NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
