"""Does scaling columns before quantizing, or making zeros by the inputs' largest values, save bits?

    python -m benchmarks.rescaling MODEL --text FILE [--windows 8] [--bits 4.5] [--layers 0 10 20]

Both are steps of "When Compression Meets Model Compression" (arXiv:2502.15443). Columns of a
projection's weights times c, the inputs over c (folded into the norm before, or the rows before),
compute the same; c_j = D_j^(share / 2) makes steps finer where inputs are strong, D being what is
left of the inputs' power after compensated rounding (docs/quantize.md); share 1 is what minimizes
the error for columns coded apart. SmoothQuant's migration (arXiv:2211.10438, equation 4, at 0.5) is
c_j = sqrt(max|X_j| / max|W_j|). Zeros: the smallest p of each row by |W_ij| max|X_j|.

A row of the table is the mean over projections of layers: bits a weight that the form takes at the
error E[(e x)^2] of the plain form, from its own error by 6.02 dB a bit, less the plain form's bits.
First with one table a matrix or eight groups of rows, as the coder of packed files has; then with
eight groups of columns, whose tables and column numbers are counted.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shortstack.checkpoint import Checkpoint
from shortstack.evaluate.perplexity import open_documents
from shortstack.intake import open_model
from shortstack.prune.calibrate import LayerwiseModel, batches
from shortstack.prune.heal.data import packed_windows
from shortstack.prune.quantize.compensate import compensated_codes, factor_of
from shortstack.prune.quantize.compensated import layer_grams
from shortstack.prune.quantize.rate import coded_bits
from shortstack.row_codes import CODE_MAX
from shortstack.tokens import Encoder

SHARES = (0.25, 0.5, 1.0)
ZEROS = (0.1, 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--bits", type=float, default=4.5)
    parser.add_argument("--layers", type=int, nargs="+")
    asked = parser.parse_args()
    checkpoint = open_model(str(asked.model), asked.model)
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with torch.no_grad():
        for weights, gram, peaks in projections(checkpoint, asked):
            for form, gains in gains_of(weights, gram, peaks, asked.bits).items():
                found[form].append(gains)
    print("| form | more bits, coder of rows | more bits, groups of columns | matrices |")
    print("|---|---:|---:|---:|")
    for form, rows in found.items():
        told = " | ".join(f"{mean:+.3f}" for mean in np.mean(rows, axis=0))
        print(f"| {form} | {told} | {len(rows)} |")


def projections(checkpoint: Checkpoint, asked: argparse.Namespace) -> Any:
    """(weights, H, largest input of each column) of the projections of the layers asked for."""
    texts = open_documents(asked.text)
    windows = packed_windows(texts, Encoder(checkpoint).encode, 512)[: asked.windows]
    model = LayerwiseModel(checkpoint, "float32")
    hidden = [model.embed(tokens) for tokens in batches(windows)]
    for index in range(model.n_layers):
        if asked.layers is None or index in asked.layers:
            peaks = largest_inputs(model, index, hidden)
            grams = layer_grams(model, index, hidden)
            for name, projection in model.projections(index).items():
                yield projection.weight.float(), grams[name], peaks[name]
        hidden = [model.layer(index, states) for states in hidden]


def largest_inputs(model: LayerwiseModel, index: int, hidden: list[Tensor]) -> dict[str, Tensor]:
    peaks: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def look(_: Any, given: tuple[Tensor, ...]) -> None:
            seen = given[0].flatten(0, -2).abs().amax(0).float()
            peaks[name] = torch.maximum(peaks[name], seen) if name in peaks else seen

        return look

    own = model.projections(index).items()
    handles = [module.register_forward_pre_hook(note(name)) for name, module in own]
    for states in hidden:
        model.layer(index, states)
    for handle in handles:
        handle.remove()
    return peaks


def gains_of(
    weights: Tensor, gram: Tensor, peaks: Tensor, bits: float
) -> dict[str, tuple[float, float]]:
    """Form -> bits more than the plain form's at its error: coder of rows, of columns."""
    # h(Gaussian) - log2(step) = bits, of each row on its own
    unit = math.sqrt(2 * math.pi * math.e) / 2**bits
    steps = weights.square().mean(1).sqrt().clamp_min(2.0**-24) * unit
    steps = torch.maximum(steps, weights.abs().amax(1) / (CODE_MAX - 8))
    order, upper = factor_of(gram)
    left = torch.empty_like(gram.diagonal())
    left[order] = upper.diagonal().pow(-2).float()
    plain = measured(weights, weights, steps, gram, torch.ones_like(left))
    widest = weights.abs().amax(0).clamp_min(1e-12)
    scales = {f"columns by D^{share / 2:g}": left.pow(share / 2) for share in SHARES}
    scales["columns as SmoothQuant, 0.5"] = (peaks.clamp_min(1e-12) / widest).sqrt()
    found: dict[str, tuple[float, float]] = {}
    for form, scale in scales.items():
        even = scale / scale.log().mean().exp()
        found[form] = against(plain, measured(weights, weights, steps, gram, even))
    nearest = measured(weights, weights, steps, gram, None)
    for share in ZEROS:
        scores = weights.abs() * peaks
        least = scores.quantile(share, dim=1, keepdim=True)
        kept = torch.where(scores > least, weights, 0.0)
        told = against(nearest, measured(weights, kept, steps, gram, None))
        found[f"{share:.0%} zeros by |W| max|X|, rounded to the nearest"] = told
    return found


Measured = tuple[float, float, float]
"""Error, bits a weight by the coder of rows, and by groups of columns."""


def measured(
    weights: Tensor, rounded: Tensor, steps: Tensor, gram: Tensor, scale: Tensor | None
) -> Measured:
    """`rounded` in place of `weights`; with `scale` compensated, its columns times `scale`."""
    if scale is None:
        codes = (rounded / steps[:, None]).round().clamp(-CODE_MAX, CODE_MAX)
        back = codes * steps[:, None]
    else:
        wide = rounded * scale
        order, upper = factor_of(gram / scale[:, None] / scale)
        codes = compensated_codes(wide, steps, order, upper, CODE_MAX).float()
        back = codes * steps[:, None] / scale
    error = back - weights
    cost = float(((error @ gram) * error).sum())
    whole = codes.to(torch.int8).numpy()
    return cost, total(whole) / whole.size, total(whole.T.copy()) / whole.size


def total(codes: Any) -> float:
    bits, per_row, tables = coded_bits(codes)
    return bits + per_row * len(codes) + tables


def against(plain: Measured, form: Measured) -> tuple[float, float]:
    """At equal error: halving the step takes a bit and quarters the error."""
    more = 0.5 * math.log2(form[0] / plain[0])
    best = min(plain[1], plain[2])
    return form[1] + more - plain[1], form[2] + more - best


if __name__ == "__main__":
    main()
