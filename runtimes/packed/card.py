"""The form `direct` on CUDA: nibbles in words of 32 bits, 16 bits for each code outside -8 to 7.

Exact. A code is a nibble, -8 to 7, and 16 h. A row's columns, filled up to a multiple of 8, are
cut into four parts of equal width, each of pairs; byte q of word j is pair j of part q, 8 added to
each nibble, the first one low. The word is then turned left by 15: so both of a pair lie where the
kernel needs them without a shift (q = 0) or with one (a turn by 16 for q = 2).

Where h is not 0 entries say so, of 16 bits each: the column in its block of 16384 (14 bits, low)
and h, -2 to 1 (2 bits, signed); a larger h is several entries, which add. `starts`, shape
(rows * blocks + 1,): where the entries of block b of row r begin, at r * blocks + b, in eights.
What fills up the last eight is 0. Entry k of n eights is in eight k % n: what the kernel's
neighbouring lanes gather at a time is of neighbouring columns.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from shortstack.row_codes import RowCodes
from shortstack.runtimes.packed.int8 import own
from shortstack.runtimes.packed.matrix import CodedMatrix

COLUMN_BITS = 14
HIGHEST, LOWEST = 1, -2
"""Of what an entry adds, in sixteens."""

EIGHT = 8
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
        self._most = EIGHT * int(self._starts[:: self._blocks].diff().max())
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
        from shortstack.runtimes.packed.kernels import BITS_OF_FLOATS, direct_kernel

        y = x.new_empty(len(x), self.rows)
        with torch.cuda.device(self.device):
            direct_kernel[lambda meta: (-(-self.rows // meta["ROWS"]), len(x))](
                *self.arguments(x, y), *BITS_OF_FLOATS, **self.constants
            )
        return y

    @property
    def constants(self) -> dict[str, int]:
        """What the kernel is compiled for."""
        return {"BLOCKS": self._blocks, "COLUMN_BITS": COLUMN_BITS}

    def arguments(self, x: Tensor, y: Tensor) -> tuple[Tensor | int, ...]:
        """What the kernel is told of x, (m, columns) bfloat16, this matrix and y, (m, rows)."""
        eighth = self._words.shape[1]
        missing = EIGHT * eighth - self.columns
        x = pad(x, (0, missing)) if missing else x.contiguous()  # pad by nothing copies, too
        held = (self._words, self._entries.view(torch.int32), self._starts, self.steps)
        return (x, *held, y, self.rows, x.shape[1], eighth)

    def codes(self, start: int, stop: int) -> Tensor:
        return self._whole(start, stop).to(torch.int8)

    def numbers(self, start: int, stop: int) -> Tensor:
        return self._whole(start, stop).to(self.dtype)  # is of that type where the kernel runs

    def _whole(self, start: int, stop: int) -> Tensor:
        """Codes as numbers. Reads from the device how many entries there are; while a graph is
        captured, which cannot, every row is taken to have as many as the longest."""
        made = self._nibbles(self._words[start:stop])
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return self._added(made, torch.arange(start, stop, device=self.device))
        starts = EIGHT * self._starts[start * self._blocks : stop * self._blocks + 1]
        first, last = starts[[0, -1]].tolist()
        if last > first:
            counts = starts.diff()
            block = torch.arange(len(counts), device=self.device)
            block = block.repeat_interleave(counts, output_size=last - first)
            entry = self._entries[first:last].long()
            column = (entry & (2**COLUMN_BITS - 1)) + (block % self._blocks << COLUMN_BITS)
            place = block // self._blocks * self.columns + column
            made.view(-1).index_add_(0, place, (entry >> COLUMN_BITS << 4).to(made.dtype))
        return made

    def code_rows(self, ids: Tensor) -> Tensor:
        """Shapes depend on nothing that only the device knows: a graph can hold this."""
        return self._added(_spread(self._words[ids], self.columns).float(), ids).to(torch.int8)

    def _added(self, nibbles: Tensor, ids: Tensor) -> Tensor:
        """Nibbles of rows `ids` and what their entries add, in place."""
        if not self._most:
            return nibbles
        column, h = self._entries_of(ids)
        return nibbles.scatter_add_(1, column, h.to(nibbles.dtype))

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
        at, *later = (
            EIGHT * self._starts[ids * self._blocks + b].long()[:, None]
            for b in range(self._blocks + 1)
        )
        place = at + torch.arange(self._most, device=self.device)
        block = torch.zeros_like(place)
        for behind in later[:-1]:
            block += place >= behind
        entry = self._entries[place.clamp(max=len(self._entries) - 1)].long()
        column = (entry & (2**COLUMN_BITS - 1)) + (block << COLUMN_BITS)
        there = place < later[-1]
        return column * there, ((entry >> COLUMN_BITS << 4) * there).float()


def pack(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(words, int32, (rows, columns / 8); entries, int16; starts, int32) of int8 codes."""
    rows, columns = codes.shape
    blocks, eighth = -(-columns // 2**COLUMN_BITS), -(-columns // EIGHT)
    words = torch.empty(rows, eighth, dtype=torch.int32, device=codes.device)
    entries, eights = [], []
    for start in range(0, rows, 4096):  # what is wider than the codes must not be all of them
        part = codes[start : start + 4096].to(torch.int16)
        low = ((part + 8) & 15) - 8
        words[start : start + 4096] = _words(low, eighth)
        row, column, h = _parts((part - low) >> 4)
        entry = ((column % 2**COLUMN_BITS) | (h << COLUMN_BITS)).to(torch.int16)
        found, n = _in_eights(entry, row * blocks + (column >> COLUMN_BITS), len(part) * blocks)
        entries.append(found)
        eights.append(n)
    ends = torch.cumsum(torch.cat(eights), 0)
    starts = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    return words, torch.cat(entries), starts


def _words(low: Tensor, eighth: int) -> Tensor:
    """int32, (n, eighth), of nibbles, -8 to 7, (n, columns)."""
    nibbles = torch.full((len(low), EIGHT * eighth), 8, dtype=torch.int32, device=low.device)
    nibbles[:, : low.shape[1]] += low
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=low.device).view(4, 1, 2)
    placed = nibbles.view(-1, 4, eighth, 2) << shifts
    return turned(placed.sum((1, 3), dtype=torch.int32), 15)  # no bit meets another


def turned(words: Tensor, left: int) -> Tensor:
    """int32, the bits moved around to the left. `left`: 1 to 31."""
    made: Tensor = (words << left) | ((words >> (32 - left)) & (2**left - 1))
    return made


def _in_eights(entry: Tensor, place: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """(entries, filled up with 0; how many eights each of `places` has) of entries in order, whose
    places ascend."""
    counts = torch.bincount(place, minlength=places)
    eights = -(-counts // EIGHT)
    before = counts.cumsum(0) - counts
    k = torch.arange(len(entry), device=entry.device) - before[place]
    n, first = eights[place], (eights.cumsum(0) - eights)[place]
    made = entry.new_zeros(EIGHT * int(eights.sum()))
    made[EIGHT * (first + k % n) + k // n] = entry
    return made, eights


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
    plain = turned(words, 17)
    nibbles = [(plain >> shift).to(torch.int8) & 15 for shift in range(0, 32, 4)]
    parts = [torch.stack(nibbles[q : q + 2], 2).flatten(1) for q in range(0, 8, 2)]
    return torch.cat(parts, 1)[:, :columns] - 8


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
