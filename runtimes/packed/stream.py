"""Matrices coded by Zstandard, decoded piece by piece into shared buffers ahead of their use.

A model uses its matrices in the same order for every token. So the pieces of all streamed matrices
are one ring: while one is multiplied, workers decode those behind it into the other buffers, over
the end of a token into the next one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shortstack.packed.coders import zstd
from shortstack.packed.resident import Pieces, cut
from shortstack.packed.tensors import join_floats, split_floats
from shortstack.row_codes import RowCodes
from shortstack.runtimes.packed.int8 import int8_on_cpu, own
from shortstack.runtimes.packed.matrix import CodedMatrix, Matrix

PIECE_BYTES = 2**20
"""Plain bytes of a piece: what a core's second cache holds."""
GATHERED_BYTES = 2**16
"""The same of a table that rows are gathered from alone: one row decodes all of its piece."""

_local = threading.local()


def decode_into(coded: bytes, buffer: memoryview) -> None:
    """One Zstandard frame into a buffer of exactly its plain size."""
    if not hasattr(_local, "decompressor"):  # one is no two threads'
        _local.decompressor = zstd.package().ZstdDecompressor()
    with _local.decompressor.stream_reader(coded) as reader:
        n = reader.readinto(buffer)
        while n < len(buffer):
            n += reader.readinto(buffer[n:])


class Ring:
    """The pieces of the streamed matrices in the order of their use, and the buffers they share.

    `workers`: threads that decode ahead; with 0 a piece is decoded when it is asked for.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pieces: list[tuple[Pieces, int]] = []
        self._buffers: list[NDArray[np.uint8]] = []
        self._ahead: deque[tuple[int, int, Future[None]]] = deque()
        self._pool: ThreadPoolExecutor | None = None

    @property
    def n_bytes(self) -> int:
        """Of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def add(self, pieces: Pieces) -> int:
        """Append a matrix; returns the number of its first piece."""
        first = len(self._pieces)
        self._pieces += [(pieces, piece) for piece in range(len(pieces.coded))]
        return first

    def start(self) -> None:
        """Allocate the buffers: as many as there are workers, and one in use; at least 2."""
        if not self._pieces:
            return
        most = max(pieces.piece_rows * pieces.columns for pieces, _ in self._pieces)
        count = max(2, self._workers + 1) if self._workers else 1
        self._buffers = [np.zeros(most, np.uint8) for _ in range(count)]
        if self._workers:
            self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")

    def walk(self, first: int, count: int) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
        """(first row, row behind the last, plain bytes) of `count` pieces from `first` on.

        The bytes are a buffer that is decoded into again once the next is asked for.
        """
        for number in range(first, first + count):
            pieces, piece = self._pieces[number]
            start, stop = pieces.span(piece)
            slot = self._decoded(number)
            yield start, stop, self._buffers[slot][: (stop - start) * pieces.columns]
            if self._pool is not None:
                last = self._ahead[-1][0] if self._ahead else number
                self._schedule((last + 1) % len(self._pieces), slot)

    def _decoded(self, number: int) -> int:
        """The buffer that holds a piece, once it is there."""
        if self._pool is None:
            self._decode(number, 0)
            return 0
        if not self._ahead or self._ahead[0][0] != number:
            self._begin_at(number)
        _, slot, done = self._ahead.popleft()
        done.result()
        return slot

    def _begin_at(self, number: int) -> None:
        """Forget what was decoded ahead: another piece than the next is wanted."""
        for _, _, done in self._ahead:
            done.result()
        self._ahead.clear()
        for slot in range(len(self._buffers)):
            self._schedule((number + slot) % len(self._pieces), slot)

    def _schedule(self, number: int, slot: int) -> None:
        assert self._pool is not None
        self._ahead.append((number, slot, self._pool.submit(self._decode, number, slot)))

    def _decode(self, number: int, slot: int) -> None:
        pieces, piece = self._pieces[number]
        start, stop = pieces.span(piece)
        decode_into(
            pieces.coded[piece], self._buffers[slot][: (stop - start) * pieces.columns].data
        )

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


class StreamMatrix(CodedMatrix):
    """The form `stream` of row codes, on the CPU. `ring` None: rows are gathered from it alone."""

    form = "stream"

    def __init__(self, made: RowCodes, dtype: torch.dtype, ring: Ring | None) -> None:
        self.rows, self.columns = made.codes.shape
        self.dtype, self.device = dtype, torch.device("cpu")
        self.steps = own(made.steps.astype(np.float32), self.device)
        size = GATHERED_BYTES if ring is None else PIECE_BYTES
        self._pieces = cut(np.ascontiguousarray(made.codes).view(np.uint8), size)
        self._ring = ring
        self._first = 0 if ring is None else ring.add(self._pieces)
        self.buffered = ring is not None
        self.n_bytes = self._pieces.n_bytes + self.steps.nbytes

    def _walk(self) -> Iterator[tuple[int, int, Tensor]]:
        assert self._ring is not None, "a table of embeddings alone is not multiplied"
        for start, stop, plain in self._ring.walk(self._first, len(self._pieces.coded)):
            yield start, stop, torch.from_numpy(plain).view(torch.int8).view(-1, self.columns)

    def few(self, x: Tensor) -> Tensor:
        made = x.new_empty(len(x), self.rows)
        for start, stop, codes in self._walk():
            made[:, start:stop] = int8_on_cpu(x, codes)
        return made.mul_(self.steps)

    def many(self, x: Tensor) -> Tensor:
        made = x.new_empty(len(x), self.rows)
        for start, stop, codes in self._walk():
            made[:, start:stop] = x @ codes.to(self.dtype).T
        return made.mul_(self.steps)

    def weights(self) -> Tensor:
        made = torch.empty(self.rows, self.columns)
        for start, stop, codes in self._walk():
            made[start:stop] = codes
        return made.mul_(self.steps[:, None])

    def codes(self, start: int, stop: int) -> Tensor:
        return self.code_rows(torch.arange(start, stop))

    def code_rows(self, ids: Tensor) -> Tensor:
        return gathered(self._pieces, ids).view(torch.int8)


class FloatStreamMatrix(Matrix):
    """A matrix without codes: the exponents' bytes coded, the others as they are (tensors.py).

    `plain`: uint8, shape (rows, columns * itemsize), as the checkpoint of type `stored` has it.
    """

    form = "stream"

    def __init__(
        self, plain: NDArray[np.uint8], stored: torch.dtype, dtype: torch.dtype, ring: Ring | None
    ) -> None:
        self.rows, self.columns = len(plain), plain.shape[1] // stored.itemsize
        self.dtype, self.device, self._stored = dtype, torch.device("cpu"), stored
        streams = split_floats(np.ascontiguousarray(plain).reshape(-1), stored.itemsize)
        size = GATHERED_BYTES if ring is None else PIECE_BYTES
        self._pieces = cut(streams[0].reshape(self.rows, self.columns), size)
        self._others = [stream.reshape(self.rows, self.columns) for stream in streams[1:]]
        self._ring = ring
        self._first = 0 if ring is None else ring.add(self._pieces)
        self.buffered = ring is not None
        self.n_bytes = self._pieces.n_bytes + sum(one.nbytes for one in self._others)

    def _joined(self, top: NDArray[np.uint8], start: int, stop: int) -> Tensor:
        others = [one[start:stop].reshape(-1) for one in self._others]
        whole = join_floats([top, *others])
        return torch.from_numpy(whole).view(self._stored).view(-1, self.columns).to(self.dtype)

    def multiply(self, x: Tensor) -> Tensor:
        assert self._ring is not None, "a table of embeddings alone is not multiplied"
        walk = self._ring.walk(self._first, len(self._pieces.coded))
        if self.dtype == torch.float32:  # whole: as nn.Linear would sum it
            rows = [self._joined(top, start, stop) for start, stop, top in walk]
            return torch.nn.functional.linear(x, torch.cat(rows))
        made = x.new_empty(*x.shape[:-1], self.rows)
        for start, stop, top in walk:
            made[..., start:stop] = x @ self._joined(top, start, stop).T
        return made

    def gather(self, ids: Tensor) -> Tensor:
        tops = gathered(self._pieces, ids).numpy()
        numbers = ids.numpy()
        streams = [tops.reshape(-1), *(one[numbers].reshape(-1) for one in self._others)]
        whole = torch.from_numpy(join_floats(streams))
        return whole.view(self._stored).view(-1, self.columns).to(self.dtype)


def gathered(pieces: Pieces, ids: Tensor) -> Tensor:
    """uint8, shape (n, columns): rows `ids`, each piece that holds some decoded once."""
    made = torch.empty(len(ids), pieces.columns, dtype=torch.uint8)
    holding = ids // pieces.piece_rows
    for piece in holding.unique().tolist():
        start, stop = pieces.span(piece)
        plain = np.empty((stop - start) * pieces.columns, np.uint8)
        decode_into(pieces.coded[piece], plain.data)
        here = (holding == piece).nonzero()[:, 0]
        made[here] = torch.from_numpy(plain).view(-1, pieces.columns)[ids[here] - start]
    return made
