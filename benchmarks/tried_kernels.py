"""Triton kernels that may be faster than runtimes/packed/kernels.py has them: direct_kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

PLACES = (11, 15, 19, 23, 27, 3, 7, 31)
"""Where the nibble of plane k begins in a word of `fewer-shifts`: the first three need no shift,
the next two one to the right by 12, the next two one to the left by 12, the last is rotated."""


@triton.jit
def added(x, entries, starts, r, live, BLOCKS: tl.constexpr, BITS: tl.constexpr, AT: tl.constexpr):
    """Sum of h x over the entries of rows `r`: as direct_kernel has it."""
    rest = tl.zeros((r.shape[0], AT), tl.float32)
    for block in tl.static_range(BLOCKS):
        at = starts + r * BLOCKS + block
        begin = tl.load(at, mask=live, other=0)
        end = tl.load(at + 1, mask=live, other=0)
        most = tl.max(end - begin, 0)
        for i in range(0, most, AT):
            place = begin[:, None] + i + tl.arange(0, AT)[None, :]
            there = place < end[:, None]
            entry = tl.load(entries + place, mask=there, other=0).to(tl.int32)
            column = (block << BITS) + (entry & ((1 << BITS) - 1))
            value = tl.load(x + column, mask=there, other=0.0).to(tl.float32)
            rest += (entry >> BITS).to(tl.float32) * value
    return tl.sum(rest, 1)


@triton.jit
def number(word, k: tl.constexpr):
    """(float32 that is nibble k of a word of PLACES and an offset, that offset and 8)."""
    if k == 3 or k == 4:
        word = word >> 12
    elif k == 5 or k == 6:
        word = word << 12
    elif k == 7:
        word = (word << 20) | ((word >> 12) & 0x80000)
    if k == 0 or k == 3:
        return ((word & 0x7800) | 0x45800000).to(tl.float32, bitcast=True), 4104.0
    if k == 1 or k == 4 or k == 5:
        return ((word & 0x78000) | 0x43800000).to(tl.float32, bitcast=True), 264.0
    return ((word & 0x780000) | 0x41800000).to(tl.float32, bitcast=True), 24.0


@triton.jit
def shifts_kernel(
    x,
    words,
    entries,
    starts,
    steps,
    y,
    rows,
    columns,
    eighth,
    BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
    AT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Nibbles at bits 11, 15 or 19 make 4096, 256 or 16 and the nibble by one operation."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = r < rows
    rest = added(x, entries, starts, r, live, BLOCKS, BITS, AT)
    base = words + r[:, None].to(tl.int64) * eighth
    sums = tl.zeros((ROWS, COLS), tl.float32)
    offsets = tl.zeros((COLS,), tl.float32)
    for start in range(0, eighth, COLS):
        c = start + tl.arange(0, COLS)
        inside = c < eighth
        word = tl.load(base + c[None, :], mask=live[:, None] & inside[None, :], other=0)
        for k in tl.static_range(8):
            column = k * eighth + c
            value = tl.load(x + column, mask=inside & (column < columns), other=0.0)
            value = value.to(tl.float32)
            made, offset = number(word, k)
            sums += made * value[None, :]
            offsets += offset * value
    step = tl.load(steps + r, mask=live, other=0.0)
    found = tl.sum(sums, 1) - tl.sum(offsets, 0) + 16.0 * rest
    tl.store(y + r, (found * step).to(y.dtype.element_ty), mask=live)


@triton.jit
def dot_kernel(
    x,
    words,
    entries,
    starts,
    steps,
    y,
    rows,
    columns,
    eighth,
    BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
    AT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Nibbles as 128 + n in bfloat16, a product of matrices whose second has one column that counts
    and 15 of zeros; 136 times the sum of the inputs comes from another with ones."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = r < rows
    rest = added(x, entries, starts, r, live, BLOCKS, BITS, AT)
    base = words + r[:, None].to(tl.int64) * eighth
    first = tl.arange(0, 16)[None, :] == 0
    ones = tl.full((16, COLS), 1.0, tl.float32).to(tl.bfloat16)
    sums = tl.zeros((ROWS, 16), tl.float32)
    inputs = tl.zeros((16, 16), tl.float32)
    for start in tl.range(0, eighth, COLS, num_stages=STAGES):
        c = start + tl.arange(0, COLS)
        inside = c < eighth
        word = tl.load(base + c[None, :], mask=live[:, None] & inside[None, :], other=0)
        for k in tl.static_range(8):
            column = k * eighth + c
            there = (inside & (column < columns))[:, None] & first
            value = tl.load(x + column[:, None], mask=there, other=0.0).to(tl.bfloat16)
            placed = ((word >> (4 * k)) & 15) | 0x4300
            number = placed.to(tl.int16).to(tl.bfloat16, bitcast=True)
            sums = tl.dot(number, value, sums)
            inputs = tl.dot(ones, value, inputs)
    total = tl.sum(tl.where(tl.arange(0, 16)[:, None] == 0, inputs, 0.0))
    step = tl.load(steps + r, mask=live, other=0.0)
    made = tl.sum(sums, 1) - 136.0 * total + 16.0 * rest
    tl.store(y + r, (made * step).to(y.dtype.element_ty), mask=live)
