"""Choose steps, round, write; say what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shortstack.checkpoint import Checkpoint
from shortstack.disk import disk_errors, require_space
from shortstack.progress import OnProgress
from shortstack.prune.quantize import QuantizeSettings
from shortstack.prune.quantize.matrices import Matrix, look_at, matrix_names
from shortstack.prune.quantize.plain import write_plain
from shortstack.prune.quantize.rate import MatrixRate, other_bits, scale_for
from shortstack.prune.quantize.write import layout_of, write_folder
from shortstack.shards import ShardReader


def run(
    checkpoint: Checkpoint, out: Path, settings: QuantizeSettings, progress: OnProgress
) -> tuple[Checkpoint, dict[str, Any]]:
    """See `shortstack.prune.quantize.quantize`."""
    names = matrix_names(checkpoint)
    n_codes = sum(np.prod(checkpoint.tensors[name].shape, dtype=int) for name in names)
    require_space(out, layout_of(checkpoint, names).n_bytes + int(n_codes))
    with disk_errors(out):
        with ShardReader(checkpoint) as reader:
            matrices = [look_at(reader, checkpoint, name) for name in names]
        units = {m.name: np.full(m.rows, m.spread, np.float32) for m in matrices}
        wanted = settings.bits * checkpoint.n_params - other_bits(checkpoint, names)
        scale = np.float32(scale_for(matrices, units, wanted))
        steps = {name: unit * scale for name, unit in units.items()}
        rates = write_plain(checkpoint, matrices, steps, out, progress)
        written = write_folder(checkpoint, out, {})
    return written, facts_of(checkpoint, matrices, rates, settings)


def facts_of(
    checkpoint: Checkpoint,
    matrices: Sequence[Matrix],
    rates: Sequence[MatrixRate],
    settings: QuantizeSettings,
) -> dict[str, Any]:
    """What the manifest keeps: sizes of the whole and of each matrix, as an entropy coder's."""
    others = other_bits(checkpoint, [m.name for m in matrices])
    coded = sum(rate.code_bits + rate.side_bits for rate in rates)
    return {
        "method": settings.method,
        "wanted_bits": settings.bits,
        "bits_per_weight": (coded + others) / checkpoint.n_params,
        "code_bits_per_weight": sum(r.code_bits for r in rates) / sum(r.n_weights for r in rates),
        "coded_bytes": round((coded + others) / 8),
        "other_bytes": others // 8,
        "n_weights": checkpoint.n_params,
        "zeros": sum(r.zeros * r.n_weights for r in rates) / sum(r.n_weights for r in rates),
        "matrices": [
            {
                "name": rate.name,
                "n_weights": rate.n_weights,
                "bits_per_weight": round(rate.bits_per_weight, 4),
                "zeros": round(rate.zeros, 5),
                "median_step": rate.step,
            }
            for rate in rates
        ],
    }
