"""The form `direct` on CUDA: nibbles in words of 32 bits, 16 bits for each code outside -8 to 7.

Exact. A row is cut into eight planes of equal width (the last one is filled up); nibble k of
word j, 8 more than its value, is of column j + k * width. A code is its nibble + 16 h; where h is
not 0 entries say so: the column in its block of 16384 (14 bits, low) and h, -2 to 1 (2 bits,
signed); a larger h is several entries, which add. `starts`, shape (rows * blocks + 1,): where the
entries of block b of row r begin, at r * blocks + b.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shortstack.row_codes import RowCodes
from shortstack.runtimes.packed.int8 import own
from shortstack.runtimes.packed.matrix import CodedMatrix

COLUMN_BITS = 14
HIGHEST, LOWEST = 1, -2
"""Of what an entry adds, in sixteens."""

ENTRIES = (32, 64, 128, 256, 512)
"""Of a row, taken in one step by the kernel: the least of these that most rows do not exceed."""
WORDS = 1024


class CardDirectMatrix(CodedMatrix):
    """The form `direct` where its kernels run. On the CPU, where none do, codes are unpacked:
    what tests hold the packing against."""

    form = "direct"

    def __init__(self, made: RowCodes, dtype: torch.dtype, device: torch.device) -> None:
        codes = torch.from_numpy(made.codes).to(device)
        self._take(codes, own(made.steps.astype(np.float32), device), dtype)

    def _take(self, codes: Tensor, steps: Tensor, dtype: torch.dtype) -> None:
        """codes: int8, shape (rows, columns), on the device."""
        self.rows, self.columns = codes.shape
        self.dtype, self.device, self.steps = dtype, codes.device, steps
        self._blocks = -(-self.columns // 2**COLUMN_BITS)
        self._words, self._entries, self._starts = pack(codes)
        ends = self._starts[:: self._blocks]
        in_row, in_block = ends[1:] - ends[:-1], self._starts[1:] - self._starts[:-1]
        self._most = int(in_row.max())
        usual = float(in_block.float().quantile(0.95)) if len(in_block) < 2**24 else ENTRIES[-1]
        self._at_once = next((n for n in ENTRIES if n >= usual), ENTRIES[-1])
        held = (self._words, self._entries, self._starts, self.steps)
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
                self._words,
                self._entries,
                self._starts,
                self.steps,
                y,
                self.rows,
                self.columns,
                self._words.shape[1],
                BLOCKS=self._blocks,
                COLUMN_BITS=COLUMN_BITS,
                ENTRIES=self._at_once,
            )
        return y

    def codes(self, start: int, stop: int) -> Tensor:
        return self._whole(start, stop).to(torch.int8)

    def numbers(self, start: int, stop: int) -> Tensor:
        return self._whole(start, stop).to(self.dtype)  # is of that type where the kernel runs

    def _whole(self, start: int, stop: int) -> Tensor:
        """Codes as numbers. Reads from the device how many entries there are: no graph holds it."""
        made = self._nibbles(self._words[start:stop])
        first, last = self._starts[[start * self._blocks, stop * self._blocks]].tolist()
        if last > first:
            counts = self._starts[start * self._blocks : stop * self._blocks + 1].diff()
            block = torch.arange(len(counts), device=self.device)
            block = block.repeat_interleave(counts, output_size=last - first)
            entry = self._entries[first:last].long()
            column = (entry & (2**COLUMN_BITS - 1)) + (block % self._blocks << COLUMN_BITS)
            place = block // self._blocks * self.columns + column
            made.view(-1).index_add_(0, place, (entry >> COLUMN_BITS << 4).to(made.dtype))
        return made

    def code_rows(self, ids: Tensor) -> Tensor:
        """Shapes depend on nothing that only the device knows: a graph can hold this."""
        made = _spread(self._words[ids], self.columns).float()
        if self._most:
            column, h = self._entries_of(ids)
            made.scatter_add_(1, column, h)
        return made.to(torch.int8)

    def _nibbles(self, words: Tensor) -> Tensor:
        """Nibbles of rows as numbers that entries can be added to exactly."""
        if self.device.type != "cuda":
            return _spread(words, self.columns).float()
        from shortstack.runtimes.packed.kernels import nibbles_kernel

        made = torch.empty(len(words), self.columns, dtype=torch.bfloat16, device=self.device)
        n, eighth = words.numel(), words.shape[1]
        with torch.cuda.device(self.device):
            nibbles_kernel[(-(-n // WORDS),)](words, made, n, eighth, self.columns, WORDS=WORDS)
        return made

    def _entries_of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(columns, 16 h), both of shape (n, most entries of a row); 0 behind a row's own."""
        at = self._starts[ids * self._blocks].long()[:, None]
        end = self._starts[(ids + 1) * self._blocks].long()[:, None]
        place = at + torch.arange(self._most, device=self.device)
        block = torch.zeros_like(place)
        for b in range(1, self._blocks):
            block += place >= self._starts[ids * self._blocks + b].long()[:, None]
        entry = self._entries[place.clamp(max=len(self._entries) - 1)].long()
        column = (entry & (2**COLUMN_BITS - 1)) + (block << COLUMN_BITS)
        there = place < end
        return column * there, ((entry >> COLUMN_BITS << 4) * there).float()


def pack(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(words, int32, (rows, columns / 8); entries, int16; starts, int32) of int8 codes."""
    rows, columns = codes.shape
    blocks, eighth = -(-columns // 2**COLUMN_BITS), -(-columns // 8)
    words = torch.empty(rows, eighth, dtype=torch.int32, device=codes.device)
    entries, counts = [], []
    for start in range(0, rows, 4096):  # what is wider than the codes must not be all of them
        part = codes[start : start + 4096].to(torch.int16)
        low = ((part + 8) & 15) - 8
        nibbles = torch.full((len(part), 8 * eighth), 8, dtype=torch.int32, device=codes.device)
        nibbles[:, :columns] += low
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
        placed = nibbles.view(-1, 8, eighth) << shifts[:, None]
        words[start : start + 4096] = placed.sum(1, dtype=torch.int32)  # no bit meets another
        row, column, h = _parts((part - low) >> 4)
        entries.append(((column % 2**COLUMN_BITS) | (h << COLUMN_BITS)).to(torch.int16))
        place = row * blocks + (column >> COLUMN_BITS)
        counts.append(torch.bincount(place, minlength=len(part) * blocks))
    ends = torch.cumsum(torch.cat(counts), 0)
    starts = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    return words, torch.cat(entries), starts


def _parts(sixteens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, columns, h) whose sums are `sixteens`, each h one that an entry can hold, in order."""
    row, column = sixteens.nonzero(as_tuple=True)
    found = sixteens[row, column].long()
    most = torch.where(found > 0, HIGHEST, LOWEST)
    times = (found + most - found.sign()) // most
    which = torch.arange(len(found), device=found.device).repeat_interleave(times)
    number = torch.arange(len(which), device=found.device) - (times.cumsum(0) - times)[which]
    left, most = found[which] - number * most[which], most[which]
    held = torch.where(most > 0, torch.minimum(left, most), torch.maximum(left, most))
    return row[which], column[which], held


def _spread(words: Tensor, columns: int) -> Tensor:
    """int8, shape (n, columns), -8 to 7, of words (n, columns / 8)."""
    planes = [(words >> (4 * k)).to(torch.int8) & 15 for k in range(8)]
    return torch.cat(planes, 1)[:, :columns] - 8


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
