"""Shannon's entropy (1948) of counted symbols: what no i.i.d. coder of them can beat."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def entropy_bits(counts: NDArray[np.int64]) -> float:
    """Bits of all symbols in one i.i.d. coder with their own frequencies:
    n log2 n - sum_k c_k log2 c_k, for `counts` c_k with the sum n."""
    present = counts[counts > 0].astype(np.float64)
    total = present.sum()
    bits = float(total * np.log2(total) - (present * np.log2(present)).sum()) if total else 0.0
    return max(0.0, bits)


def bits_a_byte(data: NDArray[Any]) -> float:
    """The same of bytes, shape (n,), a byte: 0 to 8."""
    return entropy_bits(np.bincount(data, minlength=256)) / max(1, data.size)
