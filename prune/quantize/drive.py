"""Choose steps, round, write; say what it takes."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shortstack.checkpoint import Checkpoint
from shortstack.disk import disk_errors, require_space
from shortstack.progress import OnProgress
from shortstack.prune.quantize import LearningText, QuantizeSettings
from shortstack.prune.quantize.matrices import Floats, Matrix, look_at, matrix_names
from shortstack.prune.quantize.plain import write_plain
from shortstack.prune.quantize.rate import MatrixRate, other_bits, scale_for
from shortstack.prune.quantize.write import layout_of, write_folder
from shortstack.shards import ShardReader


def run(
    checkpoint: Checkpoint,
    out: Path,
    settings: QuantizeSettings,
    calibration: list[list[int]],
    learning: LearningText | None,
    progress: OnProgress,
) -> tuple[Checkpoint, dict[str, Any]]:
    """See `shortstack.prune.quantize.quantize`."""
    names = matrix_names(checkpoint)
    n_codes = sum(math.prod(checkpoint.tensors[name].shape) for name in names)
    require_space(out, layout_of(checkpoint, names).n_bytes + n_codes)
    with disk_errors(out):
        with ShardReader(checkpoint) as reader:
            matrices = [look_at(reader, checkpoint, name) for name in names]
        wanted = settings.bits * checkpoint.n_params - other_bits(checkpoint, names)
        make = _compensated if settings.method == "compensated" else _plain
        if settings.learn_tokens and learning is not None:
            from shortstack.prune.quantize.learn import learned

            start = functools.partial(
                make, checkpoint, matrices, wanted, out, settings, calibration
            )
            found = learned(checkpoint, matrices, wanted, out, settings, learning, start, progress)
            made = Rounded(*found)
        else:
            made = make(checkpoint, matrices, wanted, out, settings, calibration, progress)
        written = write_folder(checkpoint, out, made.changed)
    return written, facts_of(checkpoint, matrices, made.rates, settings) | made.facts


@dataclass(frozen=True)
class Rounded:
    """What is known once the sidecar lies there. `changed`: other tensors that learned."""

    rates: list[MatrixRate]
    changed: dict[str, Floats] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def _steps(
    matrices: Sequence[Matrix], units: Mapping[str, Floats], wanted_bits: float
) -> dict[str, Floats]:
    """Steps in the ratios of `units` with which the matrices take `wanted_bits`."""
    scale = np.float32(scale_for(matrices, units, wanted_bits))
    return {name: unit * scale for name, unit in units.items()}


def _plain(
    checkpoint: Checkpoint,
    matrices: list[Matrix],
    wanted_bits: float,
    out: Path,
    settings: QuantizeSettings,
    calibration: list[list[int]],
    progress: OnProgress,
) -> Rounded:
    steps = _steps(matrices, {m.name: m.spreads for m in matrices}, wanted_bits)
    return Rounded(write_plain(checkpoint, matrices, steps, out, progress))


def _compensated(
    checkpoint: Checkpoint,
    matrices: list[Matrix],
    wanted_bits: float,
    out: Path,
    settings: QuantizeSettings,
    calibration: list[list[int]],
    progress: OnProgress,
) -> Rounded:
    import torch

    from shortstack.prune.calibrate import LayerwiseModel, batches
    from shortstack.prune.quantize.compensated import importances, write_compensated
    from shortstack.prune.quantize.device import device_of
    from shortstack.prune.quantize.sensitivity import measure
    from shortstack.prune.quantize.tune import Original, tune, write_tuned

    device = device_of(settings.device)
    parts = [tokens.to(device) for tokens in batches(calibration)]
    model = LayerwiseModel(checkpoint, "float32")
    model.module.to(device)
    tune_steps = settings.tune_steps if settings.tunes else 0
    total = len(parts) + model.n_layers + tune_steps

    def later(before: int) -> OnProgress:
        return lambda done, _: progress(before + done, total)

    original = Original.of(model) if tune_steps else None
    finals = original.finals if original else None
    found = measure(checkpoint, model, parts, settings.seed, later(0), finals)
    with torch.no_grad():
        rows = importances(checkpoint, model, parts, found)
        units = {name: costs.rsqrt().cpu().numpy() for name, costs in rows.items()}
        rates = write_compensated(
            *(checkpoint, model, parts, found.head_gram, matrices),
            *(_steps(matrices, units, wanted_bits), out, settings.rate_weight),
            later(len(parts)),
        )
    if original is None:
        return Rounded(rates)
    told = later(len(parts) + model.n_layers)
    tuned = tune(checkpoint, model, parts, original, tune_steps, settings.seed, told)
    rates = write_tuned(out, matrices, tuned, rates)
    changed = {name: values.float().cpu().numpy() for name, values in tuned.tensors.items()}
    kl = {str(step): nats for step, nats in tuned.kl.items()}
    return Rounded(rates, changed, {"kl_held_out": kl})


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
