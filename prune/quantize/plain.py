"""Round every weight to the nearest multiple of its row's step, without calibration text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shortstack.checkpoint import Checkpoint
from shortstack.progress import OnProgress
from shortstack.prune.quantize.matrices import Matrix, row_blocks
from shortstack.prune.quantize.rate import MatrixRate, rate_of
from shortstack.prune.quantize.uniform import fitted_steps, nearest_codes, stored_steps
from shortstack.row_codes import CODE_MAX, RowCodes, RowCodesWriter
from shortstack.shards import ShardReader

Floats = NDArray[np.float32]


def rounded(weights: Floats, steps: Floats, *, refit: bool = True) -> RowCodes:
    """The nearest codes of `weights`, (rows, columns), for the stored `steps`, (rows,).

    `refit`: then change each step to the one that suits its codes best; that costs no bits.
    """
    codes = nearest_codes(weights, steps, CODE_MAX)
    if refit:
        steps = fitted_steps(weights, codes, steps)
    return RowCodes(codes, steps.astype(np.float16))


def write_plain(
    checkpoint: Checkpoint,
    matrices: list[Matrix],
    steps: Mapping[str, Floats],
    out: Path,
    progress: OnProgress,
) -> list[MatrixRate]:
    """Write the sidecar of every matrix, a block of rows in memory; `steps` are as wanted."""
    shapes = {m.name: (m.rows, m.columns) for m in matrices}
    rates = []
    with ShardReader(checkpoint) as reader, RowCodesWriter(out, shapes) as writer:
        for done, matrix in enumerate(matrices, 1):
            stored = stored_steps(steps[matrix.name], matrix.peaks, CODE_MAX)
            codes = np.empty((matrix.rows, matrix.columns), np.int8)
            fitted = np.empty(matrix.rows, np.float16)
            at = 0
            for block in row_blocks(reader, checkpoint, matrix.name):
                part = rounded(block, stored[at : at + len(block)])
                codes[at : at + len(block)] = part.codes
                fitted[at : at + len(block)] = part.steps
                at += len(block)
            writer.write(matrix.name, RowCodes(codes, fitted))
            step = float(np.median(fitted))
            rates.append(rate_of(matrix.name, shapes[matrix.name], codes, step))
            progress(done, len(matrices))
    return rates
