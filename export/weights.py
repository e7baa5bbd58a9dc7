"""Read one tensor of a checkpoint as an array, without torch, without its neighbours."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortstack.checkpoint import Checkpoint
from shortstack.floats import STORED
from shortstack.row_codes_file import RowCodesFile

Array = NDArray[Any]


class Weights:
    """The tensors of a checkpoint as views into its files, mapped, not loaded."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._headers: dict[str, tuple[int, Mapping[str, Any]]] = {}

    def stored(self, name: str, *, writable: bool = False) -> Array:
        """The tensor as it lies in the file; BF16 as uint16 bits.

        `writable`: as torch wants it of arrays that it shares; what is written stays in memory.
        """
        info = self._checkpoint.tensors[name]
        start, entries = self._header(info.file)
        begin = start + entries[name]["data_offsets"][0]
        path = self._checkpoint.path / info.file
        return np.memmap(path, STORED[info.dtype], "c" if writable else "r", begin, info.shape)

    def dtype(self, name: str) -> str:
        return self._checkpoint.tensors[name].dtype

    @functools.cached_property
    def row_codes(self) -> RowCodesFile:
        """Codes of the matrices that have them."""
        return RowCodesFile(self._checkpoint)

    def _header(self, file: str) -> tuple[int, Mapping[str, Any]]:
        """Where the data of a shard begins, and its table of tensors."""
        if file not in self._headers:
            with (self._checkpoint.path / file).open("rb") as shard:
                (length,) = struct.unpack("<Q", shard.read(8))
                self._headers[file] = (8 + length, json.loads(shard.read(length)))
        return self._headers[file]


def interleave_rope(weight: Array, heads: int) -> Array:
    """Reorder the rows of a Q or K projection (or bias) as llama.cpp rotates them.

    transformers rotates row i of a head with row i + half; llama.cpp rotates adjacent rows.
    """
    pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))
