"""Codes in 4 bits and a remainder, multiplied without being unpacked first. Exact: nibbles.py.

On the CPU the nibbles lie as PyTorch's int4 kernel wants them, wide rows' high nibbles as further
rows of the same matrix; other codes outside -8 to 7 are a sparse matrix (rest.py). The kernel's
scales are 1 and shared by all matrices of a shape, so that a weight takes 4 bits and not 4.5.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from shortstack.row_codes import RowCodes
from shortstack.runtimes.packed.int8 import own
from shortstack.runtimes.packed.matrix import CodedMatrix
from shortstack.runtimes.packed.nibbles import split
from shortstack.runtimes.packed.repeated import Repeated
from shortstack.runtimes.packed.rest import Scratch, rest_of

WIDEST_SHARE = {"direct": 0.1, "lean": 0.2}
"""Entries a code of a narrow row. A wide row takes 4 bits a code more; an entry of the sparse
matrix takes 32, of the lean one 16."""
TILE = 64
"""Rows that the kernel's layout takes together, on AVX-512; half of it on others."""
PACKED_AT_ONCE = 64 * TILE
"""Rows that are brought into the layout together: PyTorch takes them as int32, 8 times as large."""
GROUPS = (256, 128, 64, 32)
UNITS = Repeated(1, 0)
"""Scale and zero point of every group of every row."""


def fits(columns: int) -> bool:
    """Whether the kernel takes rows of that width."""
    return columns % GROUPS[-1] == 0


class CpuDirectMatrix(CodedMatrix):
    """The forms `direct` and `lean` on the CPU. `scratch`: where a lean one's sparse matrix is
    written out for each product; None for direct."""

    def __init__(self, made: RowCodes, dtype: torch.dtype, scratch: Scratch | None = None) -> None:
        self.form = "direct" if scratch is None else "lean"
        self.rows, self.columns = made.codes.shape
        self.dtype, self.device = dtype, torch.device("cpu")
        self.steps = own(made.steps.astype(np.float32), self.device)
        parts = split(made.codes, WIDEST_SHARE[self.form], ones=scratch is None)
        self._wide = torch.from_numpy(parts.wide)
        self._place = torch.full((self.rows,), -1, dtype=torch.int32)
        self._place[self._wide] = torch.arange(len(parts.wide), dtype=torch.int32)
        self._packed, self._tall = pack(np.concatenate([parts.low, parts.high]))
        self._group = next(g for g in GROUPS if self.columns % g == 0)
        self._units = UNITS.reserve(self.columns // self._group * self._tall)
        self._scales: Tensor | None = None
        self._rest = rest_of(parts, scratch)
        self.buffered = scratch is not None
        held = [self.steps, self._wide, self._place, self._packed]
        self.n_bytes = sum(tensor.nbytes for tensor in held)
        self.n_bytes += 0 if self._rest is None else self._rest.n_bytes
        if dtype != torch.float32:  # there weights are multiplied out
            self.shared = {"units": self._units * 2 * dtype.itemsize}
            self.shared |= {} if self._rest is None else self._rest.shared

    def few(self, x: Tensor) -> Tensor:
        """Sums are float32 and rounded once, but the kernel's own."""
        if self._scales is None:  # not before all matrices are read: the longest is known then
            self._scales = UNITS.take(self._units, x.dtype).view(-1, self._tall, 2)
        whole: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self._packed, self._group, self._scales
        )
        made = whole if self._tall == self.rows else whole[:, : self.rows]
        if self._rest is not None:
            made = self._rest.multiply(x).add_(made)
        elif len(self._wide):
            made = made.float()
        if len(self._wide):
            high = whole[:, self.rows : self.rows + len(self._wide)]
            made.index_add_(1, self._wide, high.float(), alpha=16)
        # as nn.Linear's lie: attention rounds otherwise where its inputs lie otherwise
        return made.mul_(self.steps).to(x.dtype, memory_format=torch.contiguous_format)

    def many(self, x: Tensor) -> Tensor:
        return self.few(x)

    def codes(self, start: int, stop: int) -> Tensor:
        return self.code_rows(torch.arange(start, stop))

    def code_rows(self, ids: Tensor) -> Tensor:
        made = self._nibble_rows(ids).to(torch.int16)
        places = self._place[ids]
        wide = (places >= 0).nonzero()[:, 0]
        made[wide] += 16 * self._nibble_rows(self.rows + places[wide].long())
        if self._rest is not None:
            row, column, h = self._rest.entries_of(ids)
            made.index_put_((row, column), 16 * h, accumulate=True)
        return made.to(torch.int8)

    def _nibble_rows(self, ids: Tensor) -> Tensor:
        """int8, shape (n, columns), -8 to 7, out of the kernel's layout."""
        places = _layout(self.columns)
        nibbles = self._packed.view(-1, TILE * self.columns // 2)[ids // TILE]
        at = places[ids % TILE].long()
        found = nibbles.gather(1, at >> 1)
        return ((found >> (4 * (at & 1)).to(torch.uint8)) & 15).to(torch.int8) - 8


def pack(nibbles: np.ndarray) -> tuple[Tensor, int]:
    """(the kernel's layout, uint8; rows, filled up to whole tiles) of int8 values from -8 to 7."""
    columns = nibbles.shape[1]
    rows = -(-len(nibbles) // TILE) * TILE
    packed = torch.empty((rows, columns // 2), dtype=torch.uint8)
    for start in range(0, rows, PACKED_AT_ONCE):
        part = nibbles[start : start + PACKED_AT_ONCE]
        filled = np.full((min(rows - start, PACKED_AT_ONCE), columns), 8, np.int32)
        filled[: len(part)] += part
        made = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(filled), 1)
        packed[start : start + len(filled)] = made
    return packed, rows


@functools.cache
def _layout(columns: int) -> Tensor:
    """Where the nibble of each row and column of a tile lies, int32, shape (TILE, columns).

    Found out, as it differs between machines: tiles are packed whose nibbles are the digits of
    each place's number.
    """
    n = TILE * columns
    numbers = torch.arange(n, dtype=torch.int32).view(TILE, columns)
    found = torch.zeros(n, dtype=torch.int64)
    for digit in range(0, n.bit_length(), 4):
        values = (numbers >> digit) & 15
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1).reshape(-1)
        nibbles = torch.stack([packed & 15, packed >> 4], 1).reshape(-1).long()
        found |= nibbles << digit
    places = torch.empty(n, dtype=torch.int32)
    places[found] = torch.arange(n, dtype=torch.int32)
    return places.view(TILE, columns)
