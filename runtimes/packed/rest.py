"""What nibbles leave over on the CPU, as a sparse matrix of h: codes are low + 16 h (nibbles.py).

`direct` holds it as PyTorch multiplies it: 32 bits a column and 32 a number. `lean` holds 16 bits
an entry, column (12) and h (4), and writes them out for each product into arrays that all matrices
share: a quarter of the memory, at about twice the time.
"""

from __future__ import annotations

import warnings
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shortstack.runtimes.packed.nibbles import Split

BLOCK_COLUMNS = 4096
"""What 12 bits number: wider matrices are cut into so many columns."""


class Rest(Protocol):
    n_bytes: int

    def multiply(self, x: Tensor) -> Tensor:
        """x, float32 (m, columns), times the matrix of h, transposed: (m, rows)."""
        ...

    def entries_of(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(which of `ids`, column, h as int16) of each entry in rows `ids`."""
        ...


class Scratch:
    """The arrays that lean matrices are written out into, one at a time."""

    def __init__(self) -> None:
        self._most = 0
        self._columns = torch.empty(0, dtype=torch.int32)
        self._values = torch.empty(0)

    @property
    def n_bytes(self) -> int:
        return self._columns.nbytes + self._values.nbytes

    def reserve(self, n: int) -> None:
        """Some matrix has `n` entries."""
        self._most = max(self._most, n)

    def take(self, n: int) -> tuple[Tensor, Tensor]:
        """(columns, int32; values, float32), shape (n,)."""
        if len(self._columns) < self._most:
            self._columns = torch.zeros(self._most, dtype=torch.int32)
            self._values = torch.zeros(self._most)
        return self._columns[:n], self._values[:n]


def rest_of(parts: Split, scratch: Scratch | None) -> Rest | None:
    """None where nothing is left over."""
    if not len(parts.h):
        return None
    return DirectRest(parts) if scratch is None else LeanRest(parts, scratch)


class DirectRest:
    """A sparse matrix of PyTorch."""

    def __init__(self, parts: Split) -> None:
        self._matrix = _csr(
            _starts(parts.row, len(parts.low)),
            torch.from_numpy(parts.column.astype(np.int32)),
            torch.from_numpy(parts.h.astype(np.float32)),
            parts.low.shape,
            check=True,
        )
        held = (self._matrix.crow_indices(), self._matrix.col_indices(), self._matrix.values())
        self.n_bytes = sum(tensor.nbytes for tensor in held)

    def multiply(self, x: Tensor) -> Tensor:
        return _product(self._matrix, x)

    def entries_of(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        row, at = _places(self._matrix.crow_indices(), ids)
        return row, self._matrix.col_indices()[at].long(), self._matrix.values()[at].short()


class LeanRest:
    """Entries of 16 bits; one sparse matrix for every BLOCK_COLUMNS columns."""

    def __init__(self, parts: Split, scratch: Scratch) -> None:
        self._rows, self._columns = parts.low.shape
        self._scratch = scratch
        self._blocks: list[tuple[int, Tensor, Tensor]] = []
        for first in range(0, self._columns, BLOCK_COLUMNS):
            here = (parts.column >= first) & (parts.column < first + BLOCK_COLUMNS)
            twice = 1 + (parts.h[here] > 7)  # 8 is no number of 4 bits: 7 and 1, which add
            row, column = np.repeat(parts.row[here], twice), np.repeat(parts.column[here], twice)
            h = np.repeat(np.minimum(parts.h[here], 7).astype(np.int16), twice)
            h[np.cumsum(twice)[twice == 2] - 1] = 1
            made = (column - first).astype(np.int16) | (h << np.int16(12))
            scratch.reserve(len(made))
            starts = _starts(row, self._rows)
            self._blocks.append((first, starts, torch.from_numpy(made)))
        self.n_bytes = sum(starts.nbytes + made.nbytes for _, starts, made in self._blocks)

    def multiply(self, x: Tensor) -> Tensor:
        total: Tensor | None = None
        for first, starts, entries in self._blocks:
            columns, values = self._scratch.take(len(entries))
            torch.bitwise_and(entries, BLOCK_COLUMNS - 1, out=columns)
            torch.bitwise_right_shift(entries, 12, out=values)
            part = x[:, first : first + BLOCK_COLUMNS]
            shape = (self._rows, part.shape[1])
            made = _product(_csr(starts, columns, values, shape, check=False), part)
            total = made if total is None else total.add_(made)
        assert total is not None
        return total

    def entries_of(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = []
        for first, starts, entries in self._blocks:
            row, at = _places(starts, ids)
            here = entries[at]
            found.append((row, (here & (BLOCK_COLUMNS - 1)).long() + first, here >> 12))
        row, column, h = (torch.cat(parts) for parts in zip(*found, strict=True))
        return row, column, h


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    if len(x) == 1:
        return torch.mv(matrix, x[0])[None]
    return (matrix @ x.T).T


def _starts(row: np.ndarray, rows: int) -> Tensor:
    ends = np.cumsum(np.bincount(row, minlength=rows))
    return torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))


def _places(starts: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(which of `ids`, where its entry lies) of every entry of rows `ids`."""
    begin = starts[ids].long()
    counts = starts[ids + 1].long() - begin
    row = torch.repeat_interleave(torch.arange(len(ids)), counts)
    first = torch.cumsum(counts, 0) - counts
    return row, torch.arange(len(row)) - first[row] + begin[row]


def _csr(
    starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...], *, check: bool
) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=check)
