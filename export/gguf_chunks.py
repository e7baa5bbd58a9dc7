"""The tensors of a GGUF file as chunks of whole rows, converted by threads ahead of the writer.

Chunks are written into a few buffers that are used again and again: fresh memory costs the kernel
more than the conversion, and a whole table of a large model in float32 is half a gigabyte.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.export.gguf_arch import Target
from shortstack.export.gguf_codes import fill_blocks, quantize_blocks
from shortstack.export.gguf_types import TYPES
from shortstack.export.weights import Array, Weights, interleave_rope
from shortstack.families import TensorRule
from shortstack.floats import F16_MAX, bfloat16_to_float16, from_bfloat16, to_bfloat16

CHUNK_WEIGHTS = 2**20
AHEAD = 4
"""Chunks that are converted or wait to be written."""

N_THREADS = 2
NUMPY: dict[str, type[np.generic]] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "Q8_0": np.uint8,
}
"""Types that are written -> numpy's; BF16 as its bits, Q8_0 as bytes of whole blocks."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the file. `source` is its name in the checkpoint, None for zeros."""

    name: str
    shape: tuple[int, ...]
    source: str | None
    rule: TensorRule
    scale: float = 1.0

    @property
    def changed(self) -> bool:
        """Whether the numbers differ from the checkpoint's, so that they are rounded anew."""
        return self.scale != 1.0 or self.rule.plus != 0.0


@dataclass(frozen=True)
class Piece:
    """Rows of an entry, whole heads where rows are reordered within a head."""

    entry: Entry
    kind: str
    start: int
    stop: int
    heads: int

    @property
    def n_weights(self) -> int:
        return (self.stop - self.start) * math.prod(self.entry.shape[1:])

    @property
    def n_bytes(self) -> int:
        return _bytes(self.n_weights, self.kind)

    @property
    def is_first(self) -> bool:
        return self.start == 0

    @property
    def is_last(self) -> bool:
        return self.stop == self.entry.shape[0]


def pieces(checkpoint: Checkpoint, entry: Entry, kind: str) -> Iterator[Piece]:
    """Cut a tensor into pieces of about CHUNK_WEIGHTS; a row or a head is never cut."""
    n_rows = entry.shape[0]
    heads = interleaved_heads(checkpoint, entry.rule) if entry.source else 0
    unit = n_rows // heads if heads else 1
    step = unit * max(1, CHUNK_WEIGHTS // (unit * math.prod(entry.shape[1:])))
    for start in range(0, n_rows, step):
        stop = min(n_rows, start + step)
        yield Piece(entry, kind, start, stop, (stop - start) // unit if heads else 0)


def peak_bytes(checkpoint: Checkpoint, found: Iterable[Entry], kind: str | None) -> int:
    """Memory of `converted`: its buffers, and two copies in each thread on the way to them."""
    largest = 0
    for entry in found:
        piece = next(pieces(checkpoint, entry, kind_of(checkpoint, entry, kind)))
        copy = piece.n_weights * (4 if entry.changed else 2)
        largest = max(largest, (AHEAD + 1) * piece.n_bytes + 2 * N_THREADS * copy)
    return largest


def converted(weights: Weights, todo: Iterable[Piece]) -> Iterator[tuple[Piece, NDArray[np.uint8]]]:
    """Yield each piece with its bytes, in order. The bytes hold until the next one is asked for."""
    free: SimpleQueue[NDArray[np.uint8]] = SimpleQueue()
    for _ in range(AHEAD + 1):
        free.put(np.empty(0, np.uint8))

    def make(piece: Piece) -> NDArray[np.uint8]:
        buffer = free.get()
        if buffer.size < piece.n_bytes:
            buffer = np.empty(piece.n_bytes, np.uint8)
        _fill(buffer[: piece.n_bytes].view(NUMPY[piece.kind]), weights, piece)
        return buffer

    waiting: deque[tuple[Piece, Future[NDArray[np.uint8]]]] = deque()
    with ThreadPoolExecutor(N_THREADS) as pool:
        try:
            for piece in todo:
                waiting.append((piece, pool.submit(make, piece)))
                if len(waiting) > AHEAD:
                    yield from _oldest(waiting, free)
            while waiting:
                yield from _oldest(waiting, free)
        finally:
            for _, future in waiting:
                future.cancel()


def _oldest(
    waiting: deque[tuple[Piece, Future[NDArray[np.uint8]]]], free: SimpleQueue[NDArray[np.uint8]]
) -> Iterator[tuple[Piece, NDArray[np.uint8]]]:
    piece, future = waiting.popleft()
    buffer = future.result()
    yield piece, buffer[: piece.n_bytes]
    free.put(buffer)


def _fill(flat: Array, weights: Weights, piece: Piece) -> None:
    """Write a piece into `flat`, an array of the type that the file shall have."""
    entry = piece.entry
    if entry.source is None:
        flat[:] = 0
        return
    if piece.kind == "Q8_0":
        _fill_blocks(flat, weights, piece)
        return
    rows = weights.stored(entry.source)[piece.start : piece.stop]
    out, stored = flat.reshape(rows.shape), weights.dtype(entry.source)
    if entry.changed:
        single = from_bfloat16(rows) if stored == "BF16" else np.asarray(rows, np.float32)
        rows, stored = (single + np.float32(entry.rule.plus)) * np.float32(entry.scale), "F32"
    if piece.heads:
        rows = interleave_rope(rows, piece.heads)
    try:
        _convert(out, rows, stored, piece.kind)
    except OverflowError as peak:
        raise ShortstackError(
            f"{entry.source} holds {peak}, beyond the {F16_MAX:.0f} that F16 can hold. "
            "Export to F32 or BF16."
        ) from None


def _fill_blocks(flat: Array, weights: Weights, piece: Piece) -> None:
    """A matrix's own codes where it has them, else its weights rounded."""
    entry, sidecar = piece.entry, weights.row_codes
    assert entry.source is not None
    rows = weights.stored(entry.source)[piece.start : piece.stop]
    if entry.source in sidecar.names:
        own = sidecar.read_own(entry.source, piece.start, piece.stop, rows)
        fill_blocks(flat, own, piece.heads)
        return
    stored = weights.dtype(entry.source)
    single = from_bfloat16(rows) if stored == "BF16" else np.asarray(rows, np.float32)
    if entry.changed:
        single = (single + np.float32(entry.rule.plus)) * np.float32(entry.scale)
    quantize_blocks(flat, interleave_rope(single, piece.heads) if piece.heads else single)


def _convert(out: Array, rows: Array, stored: str, kind: str) -> None:
    """Write `rows` of one type into `out` of another. Raises OverflowError beyond float16."""
    match stored, kind:
        case _ if stored == kind:
            out[:] = rows
        case "BF16", "F16":
            bits = out.view(np.uint16)
            bits[:] = rows
            bfloat16_to_float16(bits.reshape(-1))
        case "BF16", "F32":
            np.left_shift(rows, 16, out=out.view(np.uint32), dtype=np.uint32)
        case _, "BF16":
            out[:] = to_bfloat16(np.asarray(rows, np.float32))
        case _, "F16":
            peak = float(max(rows.max(initial=0.0), -rows.min(initial=0.0)))
            if peak > F16_MAX:
                raise OverflowError(f"{peak:.0f}")
            out[:] = np.asarray(rows, np.float32)
        case _:
            out[:] = rows


def interleaved_heads(checkpoint: Checkpoint, rule: TensorRule) -> int:
    """In how many heads the rows are put into rotation pairs; 0 where they stay."""
    if rule.rope_heads:
        return checkpoint.dims[rule.rope_heads]
    part = rule.gguf.partition(".")[0]
    names = {"attn_q": "heads", "attn_k": "kv_heads"}
    if part in names and Target.of(checkpoint).interleaves_all:
        return checkpoint.dims[names[part]]
    return 0


def kind_of(checkpoint: Checkpoint, entry: Entry, kind: str | None) -> str:
    """The type to write a tensor in, `kind` None for the stored one: vectors are F32, as llama.cpp
    wants them."""
    if len(entry.shape) == 1 or entry.source is None:
        return "F32" if len(entry.shape) == 1 or kind is None else kind
    if kind is not None:
        return kind
    stored = checkpoint.tensors[entry.source].dtype
    return stored if stored in NUMPY and not entry.changed else "F32"


def entry_bytes(entry: Entry, kind: str) -> int:
    return _bytes(math.prod(entry.shape), kind)


def _bytes(n_weights: int, kind: str) -> int:
    return n_weights // TYPES[kind].block * TYPES[kind].block_bytes
