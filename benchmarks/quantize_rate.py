"""Rate against distortion of quantizing: matrices against Gaussian bounds, a model's perplexity.

    python -m benchmarks.quantize_rate [MODEL] [--bits 5,4.5,4] [--methods plain,compensated]
        [--calibration TEXT] [--text TEXT ...] [--windows 16]

The first table: uniform steps and an ideal entropy coder against R(D) = log2(variance / D) / 2 of a
Gaussian source at the distortion that was measured; a fine uniform quantizer is 0.254 bit above it
(log2(2 pi e / 12) / 2, Gish and Pierce, 1968). Of a MODEL also its embedding, with how often its
values repeat: weights that were rounded before are a source of few values, and steps finer than
theirs take no more bits than these. The second, where there is a MODEL and a --text: bits of the
whole file, and perplexity relative to MODEL's on every held-out --text, with a 95 % interval over
windows.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shortstack.checkpoint import Checkpoint
from shortstack.commands.quantize import quantize_model
from shortstack.entropy import entropy_bits
from shortstack.evaluate import perplexity
from shortstack.evaluate.codec import FolderCodec
from shortstack.evaluate.sets import Row, SetSpec
from shortstack.evaluate.torch_scorer import TorchScorer
from shortstack.intake import open_model
from shortstack.progress import Quiet, silent
from shortstack.prune.quantize import QuantizeSettings
from shortstack.prune.quantize.matrices import SAMPLE_WEIGHTS, row_blocks
from shortstack.prune.quantize.uniform import code_counts, nearest_codes
from shortstack.shards import ShardReader

Floats = NDArray[np.float32]
STEPS = (0.125, 0.25, 0.5, 1.0)
"""In units of the matrix's standard deviation."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--bits", default="5,4.5,4")
    parser.add_argument("--methods", default="plain,compensated")
    parser.add_argument("--calibration", default="spdx")
    parser.add_argument("--text", action="append", type=Path, default=[])
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens, a held-out text")
    asked = parser.parse_args()
    random = np.random.default_rng(0)
    print("| matrix | step / sigma | bits | SNR, dB | above Gaussian R(D), bits |")
    print("| --- | --- | --- | --- | --- |")
    shape = (1024, 4096)
    against_bound("Gaussian", random.standard_normal(shape, np.float32))
    for degrees in (5, 3, 2.1):
        heavy = random.standard_t(degrees, shape).astype(np.float32)
        against_bound(f"Student-t, {degrees} d.o.f.", heavy)
    if asked.model is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        model = open_model(asked.model, Path(folder) / "model")
        embedding = embedding_of(model)
        against_bound("embedding", embedding)
        alike = embedding / np.maximum(embedding.std(axis=1, keepdims=True), 1e-12)
        against_bound("embedding, rows of one spread", alike)
        print(f"\nThe embedding's {repeats(embedding)}")
        if asked.text:
            against_perplexity(model, asked, Path(folder))


def against_bound(name: str, matrix: Floats) -> None:
    """Print a row for each step; the same step in all rows, codes in one i.i.d. coder."""
    variance = float(matrix.var(dtype=np.float64))
    for share in STEPS:
        steps = np.full(len(matrix), share * math.sqrt(variance), np.float32)
        steps = np.maximum(steps, np.abs(matrix).max(axis=1) / 127.49).astype(np.float32)
        codes = nearest_codes(matrix, steps, 127)
        bits = entropy_bits(code_counts(codes)) / matrix.size
        error = float(np.square(matrix - codes * steps[:, None], dtype=np.float64).mean())
        above = bits - 0.5 * math.log2(variance / error)
        snr = 10 * math.log10(variance / error)
        print(f"| {name} | {share:g} | {bits:.3f} | {snr:.2f} | {above:+.3f} |", flush=True)


def repeats(matrix: Floats) -> str:
    """How many values a matrix has, and the entropy of all of them: where that is about
    log2(weights), hardly any is there twice."""
    counts = np.unique(matrix, return_counts=True)[1]
    bits = entropy_bits(counts) / matrix.size
    rows = [np.unique(row).size for row in matrix[:: max(1, len(matrix) // 256)]]
    return (
        f"{matrix.size:,} weights have {counts.size:,} values, {bits:.2f} bits of i.i.d. entropy "
        f"of at most {math.log2(matrix.size):.2f}; a row of {matrix.shape[1]} has "
        f"{np.median(rows):.0f} of them."
    )


def embedding_of(model: Checkpoint) -> Floats:
    """Rows of the embedding, evenly spaced, as many as the rate is predicted on."""
    name = model.family.outer[0].hf
    with ShardReader(model) as reader:
        rows = np.concatenate(list(row_blocks(reader, model, name)))
    return rows[:: max(1, rows.size // (8 * SAMPLE_WEIGHTS))]


def against_perplexity(model: Checkpoint, asked: argparse.Namespace, work: Path) -> None:
    """Print a row for each method and each number of bits."""
    specs = [SetSpec(f"{n}", "text", path, asked.windows) for n, path in enumerate(asked.text)]
    before = [scored(model, spec) for spec in specs]
    print("\n| method | bits | " + " | ".join(f"{path}" for path in asked.text) + " |")
    print("| --- | --- |" + " --- |" * len(specs))
    for method in asked.methods.split(","):
        for bits in map(float, asked.bits.split(",")):
            out = work / f"{method}-{bits:g}"
            made = quantize_model(
                *(str(model.path), asked.calibration, out),
                QuantizeSettings(bits=bits, method=method),
                windows=32,
                window_tokens=512,
                display=Quiet(),
            )
            cells = []
            for spec, rows in zip(specs, before, strict=True):
                ratio = perplexity.compare(rows, scored(Checkpoint.open(out), spec))["ratio"]
                ends = (100 * (ratio[end] - 1) for end in ("estimate", "low", "high"))
                cells.append("{:+.2f} % ({:+.2f} to {:+.2f})".format(*ends))
            print(f"| {method} | {made['bits_per_weight']:.3f} | " + " | ".join(cells) + " |")


def scored(model: Checkpoint, spec: SetSpec) -> list[Row]:
    with TorchScorer(model) as scorer:
        return perplexity.score(scorer, FolderCodec(model.path), spec, 0, silent)


if __name__ == "__main__":
    main()
