"""Read one tensor of a checkpoint as an array, without torch, without its neighbours."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortstack.checkpoint import Checkpoint
from shortstack.floats import STORED
from shortstack.row_codes import RowCodesReader
from shortstack.safetensors_header import Head, open_head

Array = NDArray[Any]


class Weights:
    """The tensors of a checkpoint as views into its files, mapped, not loaded."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._heads: dict[str, Head] = {}

    def stored(self, name: str, *, writable: bool = False) -> Array:
        """The tensor as it lies in the file; BF16 as uint16 bits.

        `writable`: as torch wants it of arrays that it shares; what is written stays in memory.
        """
        info = self._checkpoint.tensors[name]
        path = self._checkpoint.path / info.file
        if info.file not in self._heads:
            self._heads[info.file] = open_head(path)
        begin = self._heads[info.file].at(name)
        return np.memmap(path, STORED[info.dtype], "c" if writable else "r", begin, info.shape)

    def dtype(self, name: str) -> str:
        return self._checkpoint.tensors[name].dtype

    @functools.cached_property
    def row_codes(self) -> RowCodesReader:
        """Codes of the matrices that have them."""
        return RowCodesReader.of(self._checkpoint)


def interleave_rope(weight: Array, heads: int) -> Array:
    """Reorder the rows of a Q or K projection (or bias) as llama.cpp rotates them.

    transformers rotates row i of a head with row i + half; llama.cpp rotates adjacent rows.
    """
    pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))
