"""Triton kernels: rows of inputs times codes, for decoding on a card. Imported where one is.

A code becomes a float by its bits: 1.5 * 2^23 as an integer plus c is 12582912 + c as a float32,
exactly, so that a subtraction takes the place of a conversion, of which a card does a quarter as
many at a time. A nibble n at bits 15 to 18 of a float32 whose other bits are those of 256.0 makes
256 + n, at bits 19 to 22 of 16.0 it makes 16 + n: one logical operation, if one of its two
constants is an argument. Of two that it knows the compiler makes two operations.
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
    triton.Config(
        {"ROWS": rows, "COLS": words, "AHEAD": ahead, "PAIRS": pairs},
        num_warps=warps,
        maxnreg=registers,
    )
    for rows, words, warps, ahead, pairs, registers in (
        (4, 128, 1, 2, 64, 96),
        (4, 128, 1, 2, 32, 96),
        (4, 128, 1, 3, 64, 96),
        (4, 256, 2, 2, 64, None),
        (4, 256, 2, 2, 128, 96),
        (4, 512, 4, 2, 128, 64),
        (4, 512, 4, 0, 128, None),
        (8, 256, 2, 2, 64, 128),
        (8, 512, 4, 2, 64, 128),
    )
]
"""A warp has 128 words of each row: where there are fewer for it, warps share inputs by way of
shared memory and wait for each other. With 96 registers the 21 programs that a multiprocessor of
132 gets of 11008 rows run all at a time."""

FOUND = {"EVEN": lambda taken: taken["eighth"] % taken["COLS"] == 0}
"""What a kernel is compiled for, too: whether rows are whole steps."""

BITS_OF_FLOATS = (0x43800000, 0x41800000, 0x44008000)
"""The arguments `large`, `small` and `signed` of direct_kernel: 256.0, 16.0, and 512.0 whose
bit 15 is turned, as two bits are a signed number then."""


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


@triton.jit
def span(starts, r, live, block, BLOCKS: tl.constexpr):
    """Where the entries of a block of rows `r` begin and end, in pairs."""
    at = starts + r * BLOCKS + block
    begin = tl.load(at, mask=live, other=0) * 4
    return begin, tl.load(at + 1, mask=live, other=0) * 4


@triton.jit
def pairs_of(entries, begin, end, PAIRS: tl.constexpr):
    """Pairs of entries, uint32, shape (PAIRS, rows): entries behind the end are 0, which adds
    nothing. Rows come last as Triton otherwise spreads what it gathers in another way than what
    it has loaded."""
    place = begin[None, :] + tl.arange(0, PAIRS)[:, None]
    found = tl.load(entries + place, mask=place < end[None, :], other=0)
    return found.to(tl.uint32, bitcast=True)


@triton.jit
def of_entries(x, entry, signed, COLUMN_BITS: tl.constexpr):
    """h x of the entries in the low halves of `entry`."""
    value = tl.load(x + (entry & ((1 << COLUMN_BITS) - 1))).to(tl.float32)
    h = ((entry & (3 << COLUMN_BITS)) ^ signed).to(tl.float32, bitcast=True) - 514.0
    return h * value


@triton.jit
def words_of(base, start, eighth, live, COLS: tl.constexpr):
    """uint32, shape (rows, COLS): words from `start` on."""
    c = start + tl.arange(0, COLS)
    word = tl.load(base + c[None, :], mask=live[:, None] & (c < eighth)[None, :], other=0)
    return word.to(tl.uint32, bitcast=True)


@triton.jit
def of_words(
    sums, extra, word, x, start, eighth, large, small, EVEN: tl.constexpr, COLS: tl.constexpr
):
    """sums + nibbles times inputs, and `extra` + what is too much of them. x: pairs, uint32."""
    c = start + tl.arange(0, COLS)
    for q in tl.static_range(4):
        if EVEN:
            two = tl.load(x + (q * eighth + c))
        else:
            two = tl.load(x + (q * eighth + c), mask=c < eighth, other=0)
        first = (two << 16).to(tl.float32, bitcast=True)
        second = (two & 0xFFFF0000).to(tl.float32, bitcast=True)
        turned = word
        if q == 1:
            turned = word >> 8
        elif q == 2:
            turned = (word >> 16) | (word << 16)
        elif q == 3:
            turned = word << 8
        sums += ((turned & 0x78000) | large).to(tl.float32, bitcast=True) * first[None, :]
        extra += 264.0 * first  # as a row of zeros adds them up, so that these leave nothing
        sums += ((turned & 0x780000) | small).to(tl.float32, bitcast=True) * second[None, :]
        extra += 24.0 * second
    return sums, extra


@triton.autotune(configs=WORD_CONFIGS, key=["rows", "columns"])
@triton.heuristics(FOUND)
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
    large,
    small,
    signed,
    BLOCKS: tl.constexpr,
    COLUMN_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    AHEAD: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The same of nibbles and entries (card.py). Grid: (rows / ROWS, m).

    x: bfloat16, `columns` = 8 * eighth of them a row. Words are asked for AHEAD steps before they
    are used and wait in shared memory; inputs, which every program reads, would only come from
    further away like that. Entries are asked for in one step and used in the next, so that nothing
    waits for them; where there are more than steps, the last are used behind the words.
    """
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1)
    live = r < rows
    row = x + m * columns
    inputs = row.to(tl.pointer_type(tl.uint32), bitcast=True)
    base = words + r[:, None].to(tl.int64) * eighth
    begin, end = span(starts, r, live, 0, BLOCKS)
    most = tl.max(end - begin, 0)
    done = 0
    entry = tl.zeros((PAIRS, ROWS), tl.uint32)
    rest = tl.zeros((PAIRS, ROWS), tl.float32)
    sums = tl.zeros((ROWS, COLS), tl.float32)
    extra = tl.zeros((COLS,), tl.float32)
    for start in tl.range(0, eighth, COLS, num_stages=AHEAD + 1):
        word = words_of(base, start, eighth, live, COLS)
        if start >= 0:  # always: Triton asks ahead for what is loaded outside of branches alone
            known = (sums, extra, word, inputs, start)
            sums, extra = of_words(*known, eighth, large, small, EVEN, COLS)
        if start == 0:
            entry = pairs_of(entries, begin, end, PAIRS)
        elif done < most:
            rest += of_entries(row, entry, signed, COLUMN_BITS)
            rest += of_entries(row, entry >> 16, signed, COLUMN_BITS)
            done += PAIRS
            entry = pairs_of(entries, begin + done, end, PAIRS)
    for block in tl.static_range(BLOCKS):
        if block > 0:
            begin, end = span(starts, r, live, block, BLOCKS)
            most = tl.max(end - begin, 0)
            done = 0
            entry = pairs_of(entries, begin, end, PAIRS)
        part = row + (block << COLUMN_BITS)
        for i in range(done, most, PAIRS):
            rest += of_entries(part, entry, signed, COLUMN_BITS)
            rest += of_entries(part, entry >> 16, signed, COLUMN_BITS)
            entry = pairs_of(entries, begin + (i + PAIRS), end, PAIRS)
    step = tl.load(steps + r, mask=live, other=0.0)
    made = tl.sum(sums - extra[None, :], 1) + 16.0 * tl.sum(rest, 0)
    tl.store(y + m * rows + r, (made * step).to(y.dtype.element_ty), mask=live)


@triton.jit
def nibbles_kernel(words, out, n_words, eighth, columns, WORDS: tl.constexpr):
    """out[row, column] = nibble - 8, of the `n_words` words of whole rows. Grid: words / WORDS."""
    at = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    live = at < n_words
    word = tl.load(words + at, mask=live, other=0).to(tl.uint32, bitcast=True)
    plain = (word >> 15) | (word << 17)
    c = at % eighth
    base = out + (at // eighth).to(tl.int64) * columns
    for q in tl.static_range(4):
        first = ((plain >> (8 * q)) & 15).to(tl.int32) - 8
        second = ((plain >> (8 * q + 4)) & 15).to(tl.int32) - 8
        column = 2 * (q * eighth + c)[:, None] + tl.arange(0, 2)[None, :]
        value = tl.join(first, second).to(out.dtype.element_ty)
        tl.store(base[:, None] + column, value, mask=live[:, None] & (column < columns))
