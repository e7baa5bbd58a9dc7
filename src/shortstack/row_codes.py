"""Weights as small integers and one step size a row: what quantizing makes, packing codes and
every unpacking reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CODE_MAX = 127
"""Codes are -127 to 127, so that a row is a legal row of a GGUF Q8_0 tensor and of int8 ONNX."""


@dataclass(frozen=True)
class RowCodes:
    """A matrix of weights, `codes * steps[:, None]`.

    `codes`: int8, shape (rows, columns). `steps`: float16, shape (rows,), positive: GGUF Q8_0 keeps
    its scales in float16, and a float32 holds the product of both exactly.
    """

    codes: NDArray[np.int8]
    steps: NDArray[np.float16]

    def weights(self) -> NDArray[np.float32]:
        """The matrix, float32, shape (rows, columns). No rounding happens here."""
        weights: NDArray[np.float32] = self.codes * self.steps.astype(np.float32)[:, None]
        return weights
