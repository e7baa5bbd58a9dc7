"""The form `direct` on CUDA: planes of nibbles and 16 bits for each code outside -8 to 7. Exact.

Byte j of a row holds the nibble of column j, low, and of column j + columns / 2, high, each 8 more
than its value. A code is its nibble + 16 h; where h is not 0 an entry says so: the column in its
block of 4096 (12 bits, low) and h, -8 to 7 (4 bits, signed). h = 8 is two entries, which add.
`starts`, shape (rows * blocks + 1,): where the entries of block b of row r begin, at
r * blocks + b.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shortstack.row_codes import RowCodes
from shortstack.runtimes.packed.int8 import own
from shortstack.runtimes.packed.matrix import CodedMatrix

BLOCK_COLUMNS = 4096
ENTRIES = 64
"""Entries of a row that the kernel takes in one step."""


class CardDirectMatrix(CodedMatrix):
    """The form `direct` where its kernel runs. On the CPU, where none does, codes are unpacked:
    what tests hold the packing against."""

    form = "direct"

    def __init__(self, made: RowCodes, dtype: torch.dtype, device: torch.device) -> None:
        codes = torch.from_numpy(made.codes).to(device)
        self._take(codes, own(made.steps.astype(np.float32), device), dtype)

    def _take(self, codes: Tensor, steps: Tensor, dtype: torch.dtype) -> None:
        """codes: int8, shape (rows, columns), on the device; columns even."""
        self.rows, self.columns = codes.shape
        self.dtype, self.device, self.steps = dtype, codes.device, steps
        self._blocks = -(-self.columns // BLOCK_COLUMNS)
        self._packed, self._entries, self._starts = pack(codes)
        ends = self._starts[:: self._blocks]
        self._most = int((ends[1:] - ends[:-1]).max())
        held = (self._packed, self._entries, self._starts, self.steps)
        self.n_bytes = sum(tensor.nbytes for tensor in held)

    @classmethod
    def of(cls, codes: Tensor, steps: Tensor, dtype: torch.dtype) -> CardDirectMatrix:
        """Of codes that are on the device already."""
        made = cls.__new__(cls)
        made._take(codes, steps, dtype)
        return made

    def few(self, x: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return (x @ self.codes(0, self.rows).to(x.dtype).T).mul_(self.steps)
        from shortstack.runtimes.packed.kernels import direct_kernel

        y = x.new_empty(len(x), self.rows)
        with torch.cuda.device(self.device):
            direct_kernel[lambda meta: (-(-self.rows // meta["ROWS"]), len(x))](
                x.contiguous(),
                self._packed,
                self._entries,
                self._starts,
                self.steps,
                y,
                self.rows,
                self.columns,
                self.columns // 2,
                BLOCKS=self._blocks,
                BLOCK_COLUMNS=BLOCK_COLUMNS,
                ENTRIES=ENTRIES,
            )
        return y

    def codes(self, start: int, stop: int) -> Tensor:
        return self.code_rows(torch.arange(start, stop, device=self.device))

    def code_rows(self, ids: Tensor) -> Tensor:
        """Shapes depend on nothing that only the device knows: a graph can hold this."""
        pairs = self._packed[ids]
        low, high = (pairs & 15).to(torch.int16), (pairs >> 4).to(torch.int16)
        made = torch.cat([low, high], 1).float() - 8
        if self._most:
            column, h = self._entries_of(ids)
            made.scatter_add_(1, column, h)
        return made.to(torch.int8)

    def _entries_of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(columns, 16 h), both of shape (n, most entries of a row); 0 behind a row's own."""
        at = self._starts[ids * self._blocks].long()[:, None]
        end = self._starts[(ids + 1) * self._blocks].long()[:, None]
        place = at + torch.arange(self._most, device=self.device)
        block = torch.zeros_like(place)
        for b in range(1, self._blocks):
            block += place >= self._starts[ids * self._blocks + b].long()[:, None]
        entry = self._entries[place.clamp(max=len(self._entries) - 1)].long()
        column = (entry & (BLOCK_COLUMNS - 1)) + BLOCK_COLUMNS * block
        there = place < end
        return column * there, (16 * (entry >> 12) * there).float()


def pack(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(nibbles, uint8, (rows, columns / 2); entries, int16; starts, int32) of int8 codes."""
    rows, columns = codes.shape
    blocks, half = -(-columns // BLOCK_COLUMNS), columns // 2
    packed = torch.empty(rows, half, dtype=torch.uint8, device=codes.device)
    entries, counts = [], []
    for start in range(0, rows, 4096):  # what is wider than the codes must not be all of them
        part = codes[start : start + 4096].to(torch.int16)
        low = ((part + 8) & 15) - 8
        h = (part - low) >> 4
        nibbles = (low + 8).to(torch.uint8)
        packed[start : start + 4096] = nibbles[:, :half] | (nibbles[:, half:] << 4)
        row, column = h.nonzero(as_tuple=True)
        found = h[row, column]
        times = 1 + (found > 7).long()
        row, column = row.repeat_interleave(times), column.repeat_interleave(times)
        first = torch.cumsum(times, 0) - times
        held = found.clamp(max=7).repeat_interleave(times)
        held[first[times > 1] + 1] = 1
        entries.append(((column % BLOCK_COLUMNS) | (held.long() << 12)).to(torch.int16))
        place = row * blocks + column // BLOCK_COLUMNS
        counts.append(torch.bincount(place, minlength=len(part) * blocks))
    ends = torch.cumsum(torch.cat(counts), 0)
    starts = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    return packed, torch.cat(entries), starts


def int8_product(x: Tensor, codes: Tensor, steps: Tensor) -> Tensor:
    """x, (m, columns), times codes x steps, transposed: (m, rows), on a card."""
    from shortstack.runtimes.packed.kernels import int8_kernel

    rows, columns = codes.shape
    y = x.new_empty(len(x), rows)
    with torch.cuda.device(codes.device):
        int8_kernel[lambda meta: (-(-rows // meta["ROWS"]), len(x))](
            x.contiguous(), codes, steps, y, rows, columns
        )
    return y
