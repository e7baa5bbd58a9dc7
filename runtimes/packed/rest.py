"""What nibbles leave over on the CPU, as a sparse matrix of h: codes are low + 16 h (nibbles.py).

`direct` holds h as ones: a matrix twice as wide for inputs and their negatives, a large h as
several entries, so that PyTorch multiplies it with 32 bits an entry, the column; the numbers, all
16, are one array that all matrices share. `lean` holds 16 bits an entry, column (12) and h (4), and
writes them out for each product into shared arrays: half the memory, at about twice the time.
"""

from __future__ import annotations

import warnings
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shortstack.runtimes.packed.nibbles import Split
from shortstack.runtimes.packed.repeated import Repeated

BLOCK_COLUMNS = 4096
"""What 12 bits number: wider matrices are cut into so many columns."""


SIXTEENS = Repeated(16)
"""The numbers of the entries of `direct`."""
_SIGNS = torch.tensor([[1.0], [-1.0]])


class Rest(Protocol):
    n_bytes: int
    shared: dict[str, int]

    def multiply(self, x: Tensor) -> Tensor:
        """x, (m, columns), times the matrix of 16 h, transposed: a new float32 (m, rows)."""
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
    """A sparse matrix of ones, (rows, 2 columns), for x beside -x."""

    def __init__(self, parts: Split) -> None:
        rows, self._columns = parts.low.shape
        times = np.abs(parts.h.astype(np.int64))
        column = parts.column + np.where(parts.h < 0, self._columns, 0)
        self._starts = _starts(np.repeat(parts.row, times), rows)
        self._entries = torch.from_numpy(np.repeat(column, times).astype(np.int32))
        self._matrix: Tensor | None = None
        SIXTEENS.reserve(len(self._entries))
        self.n_bytes = self._starts.nbytes + self._entries.nbytes
        self.shared = {"sixteens": 4 * len(self._entries)}

    def multiply(self, x: Tensor) -> Tensor:
        if self._matrix is None:  # not before all matrices are read: the longest is known then
            shape = (len(self._starts) - 1, 2 * self._columns)
            values = SIXTEENS.take(len(self._entries), torch.float32).view(-1)
            self._matrix = _csr(self._starts, self._entries, values, shape)
        return _product(self._matrix, (x[:, None] * _SIGNS).reshape(len(x), -1))

    def entries_of(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        row, at = _places(self._starts, ids)
        column = self._entries[at].long()
        negative = column >= self._columns
        return row, column - self._columns * negative, 1 - 2 * negative.short()


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
        self.shared: dict[str, int] = {}  # what it writes into counts itself: Scratch

    def multiply(self, x: Tensor) -> Tensor:
        total: Tensor | None = None
        for first, starts, entries in self._blocks:
            columns, values = self._scratch.take(len(entries))
            torch.bitwise_and(entries, BLOCK_COLUMNS - 1, out=columns)
            torch.bitwise_right_shift(entries, 12, out=values)
            part = x[:, first : first + BLOCK_COLUMNS].float()
            shape = (self._rows, part.shape[1])
            made = _product(_csr(starts, columns, values, shape), part)
            total = made if total is None else total.add_(made)
        assert total is not None
        return total.mul_(16)

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


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A column may come several times in a row: its numbers add up."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
