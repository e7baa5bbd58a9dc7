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

WORD_CONFIGS = [
    triton.Config({"ROWS": rows, "COLS": words}, num_warps=warps)
    for rows, words, warps in (
        (4, 256, 2),
        (4, 128, 1),
        (8, 256, 2),
        (2, 128, 1),
        (2, 256, 2),
        (8, 256, 4),
        (8, 128, 4),
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


@triton.autotune(configs=WORD_CONFIGS, key=["rows", "columns"])
@triton.jit
def direct_kernel(
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
    COLUMN_BITS: tl.constexpr,
    ENTRIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The same of nibbles and entries (card.py). Grid: (rows / ROWS, m).

    A nibble n at bits 19 to 22 of a float32 whose other bits are those of 16.0 makes 16 + n: a
    shift, one logical operation and the product are all that a weight takes. What is too much,
    24 = 16 + 8, is taken off as a row of it, lane by lane.
    """
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1)
    live = r < rows
    row = x + m * columns
    rest = tl.zeros((ROWS, ENTRIES), tl.float32)
    for block in tl.static_range(BLOCKS):
        at = starts + r * BLOCKS + block
        begin = tl.load(at, mask=live, other=0)
        end = tl.load(at + 1, mask=live, other=0)
        most = tl.max(end - begin, 0)
        for i in range(0, most, ENTRIES):
            place = begin[:, None] + i + tl.arange(0, ENTRIES)[None, :]
            there = place < end[:, None]
            entry = tl.load(entries + place, mask=there, other=0).to(tl.int32)
            column = (block << COLUMN_BITS) + (entry & ((1 << COLUMN_BITS) - 1))
            value = tl.load(row + column, mask=there, other=0.0).to(tl.float32)
            h = ((entry >> COLUMN_BITS) + MAGIC).to(tl.float32, bitcast=True) - OFFSET
            rest += h * value
    base = words + r[:, None].to(tl.int64) * eighth
    sums = tl.zeros((ROWS, COLS), tl.float32)
    inputs = tl.zeros((COLS,), tl.float32)
    for start in range(0, eighth, COLS):
        c = start + tl.arange(0, COLS)
        inside = c < eighth
        word = tl.load(base + c[None, :], mask=live[:, None] & inside[None, :], other=0)
        for k in tl.static_range(8):
            column = k * eighth + c
            value = tl.load(row + column, mask=inside & (column < columns), other=0.0)
            value = value.to(tl.float32)
            placed = word << (19 - 4 * k) if k < 5 else word >> (4 * k - 19)
            number = ((placed & 0x780000) | 0x41800000).to(tl.float32, bitcast=True)
            sums += number * value[None, :]
            inputs += 24.0 * value  # as a row of zeros adds them up, so that these leave nothing
    step = tl.load(steps + r, mask=live, other=0.0)
    made = tl.sum(sums - inputs[None, :], 1) + 16.0 * tl.sum(rest, 1)
    tl.store(y + m * rows + r, (made * step).to(y.dtype.element_ty), mask=live)


@triton.jit
def nibbles_kernel(words, out, n_words, eighth, columns, WORDS: tl.constexpr):
    """out[row, column] = nibble - 8, of the `n_words` words of whole rows. Grid: words / WORDS."""
    at = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    live = at < n_words
    word = tl.load(words + at, mask=live, other=0)
    c = at % eighth
    base = out + (at // eighth).to(tl.int64) * columns
    for k in tl.static_range(8):
        column = k * eighth + c
        value = ((word >> (4 * k)) & 15) - 8
        tl.store(base + column, value.to(out.dtype.element_ty), mask=live & (column < columns))
