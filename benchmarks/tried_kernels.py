"""Triton kernels that may be faster than runtimes/packed/kernels.py has them: direct_kernels.py.

Each is direct_kernel but for what its text says: of one row of inputs, and of at most 16384
columns. Their arguments are direct_kernel's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shortstack.runtimes.packed.kernels import FOUND, of_entries, of_words, pairs_of, span, words_of


@triton.jit
def added(
    rest, x, entries, entry, begin, end, done, signed, BITS: tl.constexpr, PAIRS: tl.constexpr
):
    """Sum of `rest` and h x over entries from `done` on, of which the first PAIRS are here."""
    for i in range(done, tl.max(end - begin, 0), PAIRS):
        rest += of_entries(x, entry, signed, BITS)
        rest += of_entries(x, entry >> 16, signed, BITS)
        entry = pairs_of(entries, begin + (i + PAIRS), end, PAIRS)
    return tl.sum(rest, 0)


@triton.jit
def store(y, steps, r, live, sums, extra, rest):
    step = tl.load(steps + r, mask=live, other=0.0)
    made = tl.sum(sums - extra[None, :], 1) + 16.0 * rest
    tl.store(y + r, (made * step).to(y.dtype.element_ty), mask=live)


@triton.heuristics(FOUND)
@triton.jit
def registers_kernel(
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
    """Words are asked for AHEAD steps early, 1 or 2, and wait in registers. ptxas moves what is
    asked for to the end of its step: with 1 it is the first words alone that come early. Entries
    are asked for before words are used, and used behind them."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = r < rows
    inputs = x.to(tl.pointer_type(tl.uint32), bitcast=True)
    base = words + r[:, None].to(tl.int64) * eighth
    begin, end = span(starts, r, live, 0, BLOCKS)
    coming = words_of(base, 0, eighth, live, COLS)
    ahead = coming
    if AHEAD == 2:
        ahead = words_of(base, COLS, eighth, live, COLS)
    entry = pairs_of(entries, begin, end, PAIRS)
    sums = tl.zeros((ROWS, COLS), tl.float32)
    extra = tl.zeros((COLS,), tl.float32)
    for start in range(0, eighth, COLS):
        word = coming
        if AHEAD == 2:
            coming = ahead
            ahead = words_of(base, start + 2 * COLS, eighth, live, COLS)
        else:
            coming = words_of(base, start + COLS, eighth, live, COLS)
        sums, extra = of_words(sums, extra, word, inputs, start, eighth, large, small, EVEN, COLS)
    rest = tl.zeros((PAIRS, ROWS), tl.float32)
    rest = added(rest, x, entries, entry, begin, end, 0, signed, COLUMN_BITS, PAIRS)
    store(y, steps, r, live, sums, extra, rest)


@triton.jit
def in_two_turns(
    sums, extra, word, x, start, eighth, large, small, EVEN: tl.constexpr, COLS: tl.constexpr
):
    """of_words of words that are turned by 4 less: three nibbles lie ready, three more do after a
    turn by 12, two after a shift. Those at bit 11 make 4096 + n."""
    c = start + tl.arange(0, COLS)
    later = (word >> 12) | (word << 20)
    last = word << 12
    largest = large + 0x2000000
    for q in tl.static_range(4):
        if EVEN:
            two = tl.load(x + (q * eighth + c))
        else:
            two = tl.load(x + (q * eighth + c), mask=c < eighth, other=0)
        first = (two << 16).to(tl.float32, bitcast=True)
        second = (two & 0xFFFF0000).to(tl.float32, bitcast=True)
        if q == 0:
            a, more = (word & 0x7800) | largest, 4104.0
            b, again = (word & 0x78000) | large, 264.0
        elif q == 1:
            a, more = (word & 0x780000) | small, 24.0
            b, again = (later & 0x7800) | largest, 4104.0
        elif q == 2:
            a, more = (later & 0x78000) | large, 264.0
            b, again = (later & 0x780000) | small, 24.0
        else:
            a, more = (last & 0x78000) | large, 264.0
            b, again = (last & 0x780000) | small, 24.0
        sums += a.to(tl.float32, bitcast=True) * first[None, :]
        extra += more * first
        sums += b.to(tl.float32, bitcast=True) * second[None, :]
        extra += again * second
    return sums, extra


@triton.heuristics(FOUND)
@triton.jit
def turns_kernel(
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
    """A shift less a word, of words that are turned by 4 less than pack() turns them."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = r < rows
    inputs = x.to(tl.pointer_type(tl.uint32), bitcast=True)
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
        if start >= 0:
            known = (sums, extra, word, inputs, start)
            sums, extra = in_two_turns(*known, eighth, large, small, EVEN, COLS)
        if start == 0:
            entry = pairs_of(entries, begin, end, PAIRS)
        elif done < most:
            rest += of_entries(x, entry, signed, COLUMN_BITS)
            rest += of_entries(x, entry >> 16, signed, COLUMN_BITS)
            done += PAIRS
            entry = pairs_of(entries, begin + done, end, PAIRS)
    rest = added(rest, x, entries, entry, begin, end, done, signed, COLUMN_BITS, PAIRS)
    store(y, steps, r, live, sums, extra, rest)
