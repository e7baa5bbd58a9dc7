"""Codes as they are, a byte each: PyTorch's int8 kernel on the CPU, ours on CUDA."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shortstack.row_codes import RowCodes
from shortstack.runtimes.packed.matrix import CodedMatrix


class Int8Matrix(CodedMatrix):
    """int8, shape (rows, columns), and the steps."""

    form = "int8"

    def __init__(self, made: RowCodes, dtype: torch.dtype, device: torch.device) -> None:
        self._take(own(made.codes, device), own(made.steps.astype(np.float32), device), dtype)

    @classmethod
    def of(cls, codes: Tensor, steps: Tensor, dtype: torch.dtype) -> Int8Matrix:
        """Of codes that are on the device already, int8, and steps, float32."""
        made = cls.__new__(cls)
        made._take(codes, steps, dtype)
        return made

    def _take(self, codes: Tensor, steps: Tensor, dtype: torch.dtype) -> None:
        self.rows, self.columns = codes.shape
        self.dtype, self.device = dtype, codes.device
        self._codes, self.steps = codes, steps
        self.n_bytes = self._codes.nbytes + self.steps.nbytes

    def few(self, x: Tensor) -> Tensor:
        if self.device.type == "cuda":
            from shortstack.runtimes.packed.card import int8_product

            return int8_product(x, self._codes, self.steps)
        return int8_on_cpu(x, self._codes).mul_(self.steps)

    def codes(self, start: int, stop: int) -> Tensor:
        return self._codes[start:stop]

    def code_rows(self, ids: Tensor) -> Tensor:
        return self._codes[ids]


def int8_on_cpu(x: Tensor, codes: Tensor) -> Tensor:
    """x, (m, columns) bfloat16, times codes, (rows, columns) int8, transposed: sums in float32,
    rounded once."""
    return torch._weight_int8pack_mm(x.contiguous(), codes, _ones(len(codes), x.dtype))


@functools.cache
def _ones(n: int, dtype: torch.dtype) -> Tensor:
    """Scales that the kernel wants: ours are applied in float32 behind it."""
    return torch.ones(n, dtype=dtype)


def own(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """A tensor with memory of its own: what an array is a view of need not stay."""
    return torch.from_numpy(np.array(array, order="C")).to(device)
