"""Numbers that are the same for every matrix, held once for all of them."""

from __future__ import annotations

import torch
from torch import Tensor


class Repeated:
    """A row of numbers, as many times as the matrix that needs most: others take its beginning.

    All matrices `reserve` before one of them takes, or a shorter tensor is held as well.
    """

    def __init__(self, *row: float) -> None:
        self._row = row
        self._most = 0
        self._values: dict[torch.dtype, Tensor] = {}

    def reserve(self, n: int) -> int:
        self._most = max(self._most, n)
        return n

    def take(self, n: int, dtype: torch.dtype) -> Tensor:
        """Shape (n, numbers of a row)."""
        if dtype not in self._values or len(self._values[dtype]) < n:
            self._values[dtype] = torch.tensor([self._row], dtype=dtype).repeat(self._most, 1)
        return self._values[dtype][:n]
