"""Triton kernels: rows of inputs times codes, for decoding on a card. Imported where one is.

A code becomes a float by its bits: 1.5 * 2^23 as an integer plus c is 12582912 + c as a float32,
exactly, so that a subtraction takes the place of a conversion, of which a card does a quarter as
many at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAGIC = tl.constexpr(0x4B400000)
OFFSET = tl.constexpr(12582912.0)

CONFIGS = [
    triton.Config({"ROWS": rows, "COLS": columns}, num_warps=warps)
    for rows, columns, warps in (
        (2, 512, 4),
        (4, 512, 4),
        (8, 512, 4),
        (4, 1024, 4),
        (8, 256, 4),
        (1, 1024, 4),
        (16, 128, 4),
        (4, 512, 8),
    )
]


@triton.autotune(configs=CONFIGS, key=["rows", "columns"])
@triton.jit
def int8_kernel(x, codes, steps, y, rows, columns, ROWS: tl.constexpr, COLS: tl.constexpr):
    """y[m, r] = steps[r] * sum over c of x[m, c] * codes[r, c]. Grid: (rows / ROWS, m)."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1)
    live = r < rows
    base = codes + r[:, None].to(tl.int64) * columns
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, columns, COLS):
        c = start + tl.arange(0, COLS)
        inside = c < columns
        code = tl.load(base + c[None, :], mask=live[:, None] & inside[None, :], other=0)
        value = tl.load(x + m * columns + c, mask=inside, other=0.0).to(tl.float32)
        number = (code.to(tl.int32) + MAGIC).to(tl.float32, bitcast=True) - OFFSET
        sums += number * value[None, :]
    step = tl.load(steps + r, mask=live, other=0.0)
    made = tl.sum(sums, 1) * step
    tl.store(y + m * rows + r, made.to(y.dtype.element_ty), mask=live)


@triton.autotune(configs=CONFIGS, key=["rows", "columns"])
@triton.jit
def direct_kernel(
    x,
    packed,
    entries,
    starts,
    steps,
    y,
    rows,
    columns,
    half,
    BLOCKS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ENTRIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The same of nibbles and entries (card.py). Grid: (rows / ROWS, m)."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1)
    live = r < rows
    base = packed + r[:, None].to(tl.int64) * half
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, half, COLS):
        c = start + tl.arange(0, COLS)
        inside = c < half
        pair = tl.load(base + c[None, :], mask=live[:, None] & inside[None, :], other=0x88)
        wide = pair.to(tl.int32)
        first = tl.load(x + m * columns + c, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x + m * columns + half + c, mask=inside, other=0.0).to(tl.float32)
        low = ((wide & 15) + MAGIC).to(tl.float32, bitcast=True) - (OFFSET + 8.0)
        high = ((wide >> 4) + MAGIC).to(tl.float32, bitcast=True) - (OFFSET + 8.0)
        sums += low * first[None, :] + high * second[None, :]
    rest = tl.zeros((ROWS, ENTRIES), tl.float32)
    for block in range(BLOCKS):
        at = starts + r * BLOCKS + block
        begin = tl.load(at, mask=live, other=0)
        end = tl.load(at + 1, mask=live, other=0)
        most = tl.max(end - begin, 0)
        for i in range(0, most, ENTRIES):
            place = begin[:, None] + i + tl.arange(0, ENTRIES)[None, :]
            there = place < end[:, None]
            entry = tl.load(entries + place, mask=there, other=0).to(tl.int32)
            column = block * BLOCK_COLUMNS + (entry & (BLOCK_COLUMNS - 1))
            value = tl.load(x + m * columns + column, mask=there, other=0.0).to(tl.float32)
            h = ((entry >> 12) + MAGIC).to(tl.float32, bitcast=True) - OFFSET
            rest += h * value
    step = tl.load(steps + r, mask=live, other=0.0)
    made = (tl.sum(sums, 1) + 16.0 * tl.sum(rest, 1)) * step
    tl.store(y + m * rows + r, made.to(y.dtype.element_ty), mask=live)
