"""Range asymmetric numeral systems over bytes, many lanes side by side, in numpy.

Formulas: J. Duda, arXiv 1311.2540; interleaving: F. Giesen, arXiv 1402.3392. States are 32 bits in
[2^16, 2^32), renormalised by 16-bit words; frequencies are whole numbers that sum to 2^14, so
that no platform's floats decide what a stream means.

Rows are sorted into up to MAX_GROUPS groups of like spread, each with frequencies of its own, where
that pays for the tables. A coded chunk, little endian:

    u8 number of groups G; if G > 1: u8 group of each row
    for every group: u8 first byte value, u8 last, u16 frequency of each from the first to the last
    u32 lanes L, u32 words W, L x u32 states, W x u16 words

Values go around: behind 255 comes 0, so that codes from -9 to 9 are 19 values, 247 to 9.
L is at most 2^14, and at least the bytes of the chunk / 2^13. The rows of group 0 come first, then
those of group 1, ...; symbol i of this sequence belongs to lane i mod L and step i div L, and has
the frequencies f of its row's group; c(s) is the sum of f below s. A step does, in every lane with
state x: slot = x mod 2^14, s the symbol with c(s) <= slot < c(s) + f(s), x := f(s) (x div 2^14) +
slot - c(s); then, lane by lane, where x < 2^16 the next word w makes x := 2^16 x + w. At the end
every state is 2^16 and no word is left.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from shortstack.packed.coders import MAX_CHUNK_BYTES, Bytes, CodingError

PACKAGE: str | None = None
BITS = 14
TOTAL = 1 << BITS
SYMBOLS_A_LANE = 2048
"""A lane costs about 24 bits, what its state holds beyond symbols: 0.012 bits a symbol. Fewer lanes
are slow, as a step is a few numpy calls:
4 M codes are decoded at 194 MB/s with 1024 symbols a lane, at 137 with 2048, at 87 with 4096."""

ENOUGH_LANES = 1024
"""Streams that would have fewer get twice as many: below it a step takes as long with half."""

SYMBOLS_A_LANE_AT_BEST = 4096
"""Of the effort `best`, however few lanes that are."""

MAX_LANES = 1 << 14
MAX_STEPS = 1 << 13
"""A chunk with fewer lanes than that allows is refused: a step takes as long however few it has."""

MAX_GROUPS = 8
U32 = np.uint32


def encode(data: Bytes, columns: int, effort: str) -> bytes:
    """Code a chunk; in groups of rows where their tables save more than they take. The effort
    `best` takes fewer lanes: smaller, and slower to decode."""
    whole = _encode_groups(data, columns, None, effort)
    groups = _group_rows(data, columns)
    if groups is None:
        return whole
    grouped = _encode_groups(data, columns, groups, effort)
    return min(whole, grouped, key=len)


def decode(coded: bytes, n_bytes: int, columns: int) -> Bytes:
    try:
        return _decode(coded, n_bytes, columns)
    except (struct.error, ValueError, IndexError) as error:
        if isinstance(error, CodingError):
            raise
        raise CodingError(f"its parts do not fit: {error}") from None


def _group_rows(data: Bytes, columns: int) -> Bytes | None:
    """Group of each row by the spread of its signed bytes; None where there are too few."""
    rows = data.size // columns if columns else 0
    if rows < 2 * MAX_GROUPS or rows * columns != data.size:
        return None
    table = data.reshape(rows, columns).view(np.int8)
    spread = np.array([np.abs(row, dtype=np.int16).mean() for row in table])
    edges = np.quantile(spread, np.arange(1, MAX_GROUPS) / MAX_GROUPS)
    return np.searchsorted(edges, spread, side="right").astype(np.uint8)


def _encode_groups(data: Bytes, columns: int, groups: Bytes | None, effort: str) -> bytes:
    names = np.unique(groups) if groups is not None else np.zeros(1, np.uint8)
    if groups is None or len(names) == 1:
        return b"\x01" + _encode_sorted(data, np.array([data.size]), effort)
    order = np.searchsorted(names, groups).astype(np.uint8)
    rows = np.argsort(order, kind="stable")
    sizes = np.bincount(order) * columns
    body = _encode_sorted(data.reshape(-1, columns)[rows].reshape(-1), sizes, effort)
    return bytes([len(names)]) + order.tobytes() + body


def frequencies(counts: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Whole numbers that sum to TOTAL, at least 1 for what occurs, near `counts` in proportion."""
    present = np.flatnonzero(counts)
    if present.size == 0:
        return np.zeros(counts.size, U32)
    exact = counts[present] * (TOTAL / counts.sum())
    found = np.maximum(1, np.floor(exact)).astype(np.int64)
    surplus = int(found.sum()) - TOTAL
    while surplus > 0:  # many rare values: the frequent ones give
        given = min(surplus, int(found.max()) - 1)
        at = int(found.argmax())
        given = min(given, max(1, given // 2))
        found[at] -= given
        surplus -= given
    if surplus < 0:
        best = np.argsort(-(exact - found), kind="stable")[:-surplus]
        np.add.at(found, np.resize(best, -surplus), 1)
    result = np.zeros(counts.size, U32)
    result[present] = found
    return result


def _encode_sorted(symbols: Bytes, sizes: NDArray[np.int64], effort: str) -> bytes:
    """Code symbols that lie group by group, `sizes` of them in each."""
    heads, tables, at = [], [], 0
    for size in sizes.tolist():
        freq = frequencies(np.bincount(symbols[at : at + size], minlength=256))
        first, last = _span(freq)
        values = _values(first, last)
        heads.append(bytes([first, last]) + freq[values].astype("<u2").tobytes())
        tables.append(freq)
        at += size
    states, words = _push(symbols, np.array(tables), sizes, _lanes(symbols.size, effort))
    counts = struct.pack("<II", states.size, words.size)
    return b"".join(heads) + counts + states.tobytes() + words.tobytes()


def _span(freq: NDArray[np.uint32]) -> tuple[int, int]:
    """First and last of the fewest neighbouring byte values, going around, with all that occur."""
    used = np.flatnonzero(freq)
    if not used.size:
        return 0, 0
    behind = np.roll(used, -1)
    at = int(np.argmax((behind - used - 1) % 256))  # the widest gap is left out
    return int(behind[at]), int(used[at])


def _values(first: int, last: int) -> NDArray[np.int64]:
    return (first + np.arange((last - first) % 256 + 1)) % 256


def _push(
    symbols: Bytes, freq: NDArray[np.uint32], sizes: NDArray[np.int64], lanes: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """Encode backwards, so that decoding runs forwards. `freq` has the shape (groups, 256)."""
    start = (np.cumsum(freq, axis=1) - freq).astype(U32).reshape(-1)
    flat, bounds = freq.reshape(-1), np.cumsum(sizes)
    states = np.full(lanes, 1 << 16, U32)
    out: list[NDArray[np.uint16]] = [np.empty(0, "<u2")]
    shift = U32(32 - BITS)
    for begin in reversed(range(0, symbols.size, max(1, lanes))):
        key = symbols[begin : begin + lanes].astype(np.int64)
        key += 256 * _groups_at(begin, key.size, bounds)
        x, f = states[: key.size], flat[key]
        full = np.flatnonzero((x >> shift) >= f)
        out.append(x[full].astype("<u2"))
        x[full] >>= U32(16)
        quotient = x // f
        x += quotient * (U32(TOTAL) - f) + start[key]  # = (q << BITS) + (x - q f) + start
    return states, np.concatenate(out[::-1])


def _lanes(n_symbols: int, effort: str) -> int:
    if effort == "best":
        return min(MAX_LANES, -(-n_symbols // SYMBOLS_A_LANE_AT_BEST))
    few, many = -(-n_symbols // SYMBOLS_A_LANE), -(-2 * n_symbols // SYMBOLS_A_LANE)
    return min(MAX_LANES, max(few, min(many, ENOUGH_LANES)))


def _groups_at(begin: int, length: int, bounds: NDArray[np.int64]) -> NDArray[np.int64] | int:
    """Groups of the symbols of a step: one number nearly always."""
    first = int(np.searchsorted(bounds, begin, side="right"))
    if begin + length <= bounds[first]:
        return first
    return np.searchsorted(bounds, np.arange(begin, begin + length), side="right")


def _decode(coded: bytes, n_bytes: int, columns: int) -> Bytes:
    if n_bytes > MAX_CHUNK_BYTES:
        raise CodingError(f"a chunk of {n_bytes} bytes")
    n_groups, at = coded[0], 1
    if not 1 <= n_groups <= MAX_GROUPS or (n_groups > 1 and columns < 1):
        raise CodingError(f"{n_groups} groups of rows of {columns}")
    if n_groups == 1:
        return _pull(coded, at, np.array([n_bytes]))
    rows = n_bytes // columns
    order = np.frombuffer(coded, np.uint8, rows, at)
    if rows * columns != n_bytes or order.max(initial=0) >= n_groups:
        raise CodingError("rows of groups that are not there")
    sizes = np.bincount(order, minlength=n_groups) * columns
    table = np.empty((rows, columns), np.uint8)
    sorted_rows = _pull(coded, at + rows, sizes).reshape(rows, columns)
    table[np.argsort(order, kind="stable")] = sorted_rows
    return table.reshape(-1)


def _pull(coded: bytes, at: int, sizes: NDArray[np.int64]) -> Bytes:
    """Decode everything behind the groups of the rows."""
    tables = []
    for size in sizes.tolist():
        values = _values(coded[at], coded[at + 1])
        freq = np.zeros(256, U32)
        freq[values] = np.frombuffer(coded, "<u2", values.size, at + 2)
        if int(freq.sum()) != (TOTAL if size else 0):
            raise CodingError(f"frequencies that sum to {int(freq.sum())}")
        tables.append(freq)
        at += 2 + 2 * values.size
    lanes, n_words = struct.unpack_from("<II", coded, at)
    if at + 8 + 4 * lanes + 2 * n_words != len(coded):
        raise CodingError("its length is not what its counts say")
    total = int(sizes.sum())
    if lanes > MAX_LANES or bool(lanes) != bool(total) or total > lanes * MAX_STEPS:
        raise CodingError(f"{lanes} lanes for {total} bytes")
    states = np.frombuffer(coded, "<u4", lanes, at + 8).astype(U32)
    words = np.frombuffer(coded, "<u2", n_words, at + 8 + 4 * lanes)
    out = np.empty(total, np.uint8)
    _run(states, words, tables, np.cumsum(sizes), out)
    return out


def _run(
    states: NDArray[np.uint32],
    words: NDArray[np.uint16],
    tables: list[NDArray[np.uint32]],
    bounds: NDArray[np.int64],
    out: Bytes,
) -> None:
    slots = [_slots(freq) for freq in tables]
    symbol, width, offset = (np.concatenate(part) for part in zip(*slots, strict=True))
    lanes, taken, bits, mask = states.size, 0, U32(BITS), U32(TOTAL - 1)
    for begin in range(0, out.size, max(1, lanes)):
        step = out[begin : begin + lanes]
        x = states[: step.size]
        slot = (x & mask).astype(np.int64)
        slot += TOTAL * _groups_at(begin, step.size, bounds)
        step[:] = symbol[slot]
        x >>= bits
        x *= width[slot]
        x += offset[slot]
        empty = np.flatnonzero(x < U32(1 << 16))
        if taken + empty.size > words.size:
            raise CodingError("it ends too early")
        x[empty] = (x[empty] << U32(16)) | words[taken : taken + empty.size]
        taken += empty.size
    if taken != words.size or (states != 1 << 16).any():
        raise CodingError("it does not end where it began")


def _slots(freq: NDArray[np.uint32]) -> tuple[Bytes, NDArray[np.uint32], NDArray[np.uint32]]:
    """For each of TOTAL slots: its symbol, that symbol's frequency, the slot's place within it."""
    if not freq.any():
        return np.zeros(TOTAL, np.uint8), np.zeros(TOTAL, U32), np.zeros(TOTAL, U32)
    start = np.cumsum(freq) - freq
    symbol = np.repeat(np.arange(256, dtype=np.uint8), freq)
    return symbol, freq[symbol], (np.arange(TOTAL) - start[symbol]).astype(U32)
