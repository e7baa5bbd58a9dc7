"""Hold our int4 ONNX against the other ways to one: size, distance, decode speed, time, memory.

    python -m benchmarks.onnx_int4 MODEL [--repeats 6] [--tokens 128] [--optimum PYTHON]

Rows: ours, rounded with importance (of 32 windows of the text's calibration part; distances are on
its test part) and without, and from genai's graph; onnxruntime-genai's own int4 builder; and, with
the Python of an environment that has optimum-onnx (`make .venv-optimum/.dev`), its export rounded
by onnxruntime's MatMulNBitsQuantizer. Decoding is timed in turn, every run in a process of its own:
compare the columns of one table, not tables of two runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.racing import race, windows

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.export import exporter
from shortstack.export.onnx_graph import bytes_per_token
from shortstack.export.to_onnx import QUIET
from shortstack.export.verify import kl_divergence, log_softmax
from shortstack.footprint import Footprint, measured
from shortstack.intake import open_model
from shortstack.runtimes import open_session

OPTIMUM = """
import sys
from optimum.exporters.onnx import main_export
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer)
source, made, out = sys.argv[1:]
main_export(source, output=made, task="text-generation-with-past", do_validation=False)
config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, accuracy_level=4)
quantizer = MatMulNBitsQuantizer(made + "/model.onnx", algo_config=config)
quantizer.process()
quantizer.model.save_model_to_file(out + "/model.onnx", use_external_data_format=True)
"""


CALIBRATION = (256, 32)
"""Length and count of windows: what a recipe takes by default."""


def ours(known: list[list[int]], **options: str) -> Callable[[Checkpoint, Path], None]:
    def make(checkpoint: Checkpoint, out: Path) -> None:
        spec = ExportSpec.parse("onnx:int4", **options)
        exporter("onnx").export(checkpoint, spec, out, calibration=known)

    return make


def genai(checkpoint: Checkpoint, out: Path) -> None:
    """As its documentation says: python -m onnxruntime_genai.models.builder -p int4 -e cpu."""
    module = "onnxruntime_genai.models.builder"
    words = ["-i", str(checkpoint.path), "-o", str(out), "-p", "int4", "-e", "cpu"]
    with tempfile.TemporaryDirectory() as cache:
        told = [sys.executable, "-m", module, *words, "-c", cache]
        subprocess.run(told, check=True, capture_output=True, env={**os.environ, **QUIET})


def optimum(python: str) -> Callable[[Checkpoint, Path], None]:
    def make(checkpoint: Checkpoint, out: Path) -> None:
        with tempfile.TemporaryDirectory() as made:
            told = [python, "-c", OPTIMUM, str(checkpoint.path), made, str(out)]
            subprocess.run(told, check=True, capture_output=True, env={**os.environ, **QUIET})

    return make


def distance(path: Path, tokens: Sequence[int], truth: Any) -> float:
    with open_session(path, "onnxruntime", threads=2, context_tokens=len(tokens)) as session:
        found = log_softmax(session.prefill(tokens, all_logits=True))
    return float(np.mean(kl_divergence(truth, found)))


def makers_of(
    known: list[list[int]], python: str | None
) -> dict[str, Callable[[Checkpoint, Path], None]]:
    """The rows of the table; `python` is the environment with optimum-onnx."""
    makers = {
        "ours": ours(known, builder="mobius"),
        "ours, imatrix=no": ours(known, builder="mobius", imatrix="no"),
        "ours, genai's graph": ours(known, builder="genai"),
        "genai's builder": genai,
    }
    if python is None:
        print("no --optimum PYTHON: its row is left out", file=sys.stderr)
        return makers
    return {**makers, "optimum": optimum(python)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", default="spdx")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--optimum", metavar="PYTHON")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        checkpoint = open_model(asked.model, Path(work) / "model")
        tokens = windows(checkpoint, asked.text, 2 * asked.tokens, 1)[0]
        known = windows(checkpoint, asked.text, *CALIBRATION, "calibration")
        makers = makers_of(known, asked.optimum)
        with open_session(checkpoint.path, "pytorch", threads=2, context_tokens=512) as session:
            truth = log_softmax(session.prefill(tokens, all_logits=True))
        folders, spent = {}, {}
        for name, make in makers.items():
            out = Path(work) / name.replace(" ", "-")
            out.mkdir()
            with measured() as meter:
                make(checkpoint, out)
            spent[name] = meter.footprint
            folders[name] = out
        seconds = race(folders, tokens, asked.tokens, asked.repeats)
        first = next(iter(folders))
        print("| | MB | MB a token | KL | export s | peak MB | TPOT ms | decode speed |")
        print("|---|---|---|---|---|---|---|---|")
        for name, folder in folders.items():
            pairs = zip(seconds[first], seconds[name], strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            size = sum(f.stat().st_size for f in folder.glob("model.onnx*"))
            figures = (
                f"{size / 1e6:.1f}",
                f"{bytes_per_token(folder / 'model.onnx') / 1e6:.1f}",
                f"{distance(folder, tokens, truth):.3f}",
                f"{spent[name].wall_s:.1f}",
                _above_start(spent[name]),
                f"{1e3 * statistics.median(seconds[name]):.2f}",
                f"{ratio:.2f}",
            )
            print(f"| {name} | {' | '.join(figures)} |", flush=True)
        print(json.dumps({name: [round(s, 5) for s in found] for name, found in seconds.items()}))
        shutil.rmtree(work, ignore_errors=True)


def _above_start(found: Footprint) -> str:
    """Megabytes of anonymous memory beyond what this process held, children included."""
    if found.peak_anon_bytes is None or found.start_anon_bytes is None:
        return "unknown"
    return f"{(found.peak_anon_bytes - found.start_anon_bytes) / 1e6:,.0f}"


if __name__ == "__main__":
    main()
