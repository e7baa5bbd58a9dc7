"""Rows of a graph whose codes and steps are known: found by what they hold, not by their names.

Builders rename, fuse and turn matrices; a row that has the very weights of a quantized row can take
its codes, wherever it went.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortstack.checkpoint import Checkpoint
from shortstack.row_codes import RowCodesReader

ZERO = 128
AT_ONCE = 1 << 22
"""Weights that are looked at together."""


class KnownRows:
    """Every row of a checkpoint's sidecar by a hash of its float32 weights.

    `found` and `missing` name the matrices of the graph that were looked for. Hashing takes a
    second a gigabyte of float32; the table 150 bytes a row.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._sidecar = RowCodesReader.of(checkpoint)
        self._names = sorted(self._sidecar.names)
        self._rows: dict[bytes, tuple[int, int]] = {}
        self.found: list[str] = []
        self.missing: list[str] = []
        for index, name in enumerate(self._names):
            rows, columns = checkpoint.tensors[name].shape
            step = max(1, AT_ONCE // columns)
            for begin in range(0, rows, step):
                part = self._sidecar.read(name, begin, min(rows, begin + step)).weights()
                for row, key in enumerate(_keys(part), begin):
                    self._rows.setdefault(key, (index, row))

    def __bool__(self) -> bool:
        return bool(self._rows)

    def of(
        self, name: str, table: NDArray[Any], block: int, *, half: bool
    ) -> tuple[NDArray[np.uint8], NDArray[Any]] | None:
        """Codes and scales of a matrix (rows, width), as `quantize_rows` gives them; None unless
        every row is known."""
        rows, width = table.shape
        codes = np.empty((rows, width), np.uint8)
        steps = np.empty(rows, np.float16)
        chunk = max(1, AT_ONCE // width)
        for begin in range(0, rows, chunk):
            part = np.ascontiguousarray(table[begin : begin + chunk], np.float32)
            places = [self._rows.get(key) for key in _keys(part)]
            known = [place for place in places if place is not None]
            if len(known) != len(places):
                self.missing.append(name)
                return None
            self._copy(known, codes[begin : begin + chunk], steps[begin : begin + chunk])
        self.found.append(name)
        scales = np.repeat(steps[:, None], width // block, 1)
        return codes.reshape(rows, -1, block), scales if half else scales.astype(np.float32)

    def _copy(
        self,
        places: list[tuple[int, int]],
        codes: NDArray[np.uint8],
        steps: NDArray[np.float16],
    ) -> None:
        index, row = np.array(places).T
        for one in np.unique(index):
            mine = np.flatnonzero(index == one)
            first, last = int(row[mine].min()), int(row[mine].max())
            read = self._sidecar.read(self._names[one], first, last + 1)
            taken = row[mine] - first
            codes[mine] = (read.codes[taken].astype(np.int16) + ZERO).astype(np.uint8)
            steps[mine] = read.steps[taken]


def _keys(rows: NDArray[np.float32]) -> list[bytes]:
    return [hashlib.blake2b(row.data, digest_size=16).digest() for row in rows]
