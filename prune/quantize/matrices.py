"""Which tensors are quantized, read a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shortstack.checkpoint import DTYPE_BYTES, Checkpoint
from shortstack.errors import ShortstackError
from shortstack.families import expected_tensors
from shortstack.floats import from_stored
from shortstack.shards import ShardReader

BLOCK_WEIGHTS = 2**22
SAMPLE_WEIGHTS = 2**18
"""Of each matrix, on which rates are predicted: their error is below 0.001 bit a weight."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Matrix:
    """What has to be known of a matrix to choose its steps.

    `peaks`: the largest absolute weight of each row, (rows,). `sample`: whole rows of it, evenly
    spaced, and `sampled`, their numbers. `spreads`: the root mean square of each row, positive.
    """

    name: str
    rows: int
    columns: int
    peaks: Floats
    spreads: Floats
    sample: Floats
    sampled: NDArray[np.int64]

    @property
    def n_weights(self) -> int:
        return self.rows * self.columns


def matrix_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Every matrix of the decoder: projections, the embedding, the head where it is stored.

    Norms, biases and what lies outside the decoder stay as they are.
    """
    expected = expected_tensors(checkpoint.family, checkpoint.dims)
    return tuple(
        name for name, _, shape, _ in expected if len(shape) == 2 and name in checkpoint.tensors
    )


def row_blocks(reader: ShardReader, checkpoint: Checkpoint, name: str) -> Iterator[Floats]:
    """The rows of a matrix as float32, a block of at most about BLOCK_WEIGHTS weights at a time.

    Raises ShortstackError for a weight that is not finite.
    """
    info = checkpoint.tensors[name]
    rows, columns = info.shape
    width = columns * DTYPE_BYTES[info.dtype]
    step = max(1, BLOCK_WEIGHTS // columns)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        stored = reader.read(name, start * width, stop * width)
        block = from_stored(stored, info.dtype).reshape(-1, columns)
        if not np.isfinite(block).all():
            raise ShortstackError(
                f"{checkpoint.path}: {name} holds numbers that are not finite. "
                "Download the folder again."
            )
        yield block


def look_at(reader: ShardReader, checkpoint: Checkpoint, name: str) -> Matrix:
    """Read a matrix once for its peaks and a sample of its rows."""
    rows, columns = checkpoint.tensors[name].shape
    every = max(1, rows * columns // SAMPLE_WEIGHTS)
    peaks, kept, spreads, at = [], [], [], 0
    for block in row_blocks(reader, checkpoint, name):
        peaks.append(np.abs(block).max(axis=1))
        spreads.append(np.sqrt(np.square(block).mean(axis=1)))
        kept.append(block[-at % every :: every].copy())
        at += len(block)
    sampled = np.arange(0, rows, every)
    wide = np.maximum(np.concatenate(spreads), np.float32(2.0**-24))  # a row of zeros has a step
    return Matrix(name, rows, columns, np.concatenate(peaks), wide, np.concatenate(kept), sampled)
