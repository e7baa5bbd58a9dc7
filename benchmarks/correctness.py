"""Whose export of a cut model is right: ours, and the builders' own, from one command.

    python -m benchmarks.correctness [--cuts none,scattered,attention] [--models gemma3,…]
        [--optimum PYTHON]

Tiny random models of every family (tests/zoo.py), cut, exported, and run on 48 tokens at once and
16 one by one. A figure is the largest difference of a logit from float32 PyTorch, in units of the
largest logit; right is below 1e-4. For files of GGUF see benchmarks/gguf_cut.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.agreement import distance, run
from tests.support import make_cell
from tests.zoo import NAMES, make_model

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError, one_line
from shortstack.export import exporter
from shortstack.export.to_onnx import QUIET

OPTIMUM = """
import sys
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], output=sys.argv[2], task="text-generation-with-past", do_validation=False)
"""
MOBIUS = """
import sys
import mobius
package = mobius.build(sys.argv[1], dtype="f32", execution_provider="cpu")
package.save(sys.argv[2])
"""
RIGHT = 1e-4
Maker = Callable[[Checkpoint, Path], None]


def ours(checkpoint: Checkpoint, out: Path) -> None:
    exporter("onnx").export(checkpoint, ExportSpec.parse("onnx:fp32"), out)


def by_script(python: str, script: str) -> Maker:
    def make(checkpoint: Checkpoint, out: Path) -> None:
        _call([python, "-c", script, str(checkpoint.path), str(out)])

    return make


def genai(checkpoint: Checkpoint, out: Path) -> None:
    with tempfile.TemporaryDirectory() as cache:
        module = "onnxruntime_genai.models.builder"
        words = ["-i", str(checkpoint.path), "-o", str(out), "-p", "fp32", "-e", "cpu"]
        _call([sys.executable, "-m", module, *words, "-c", cache])


def _call(command: list[str]) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **QUIET}, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no words"]
        raise ShortstackError(f"fails: {one_line(lines[-1], 60)}")


def judge(checkpoint: Checkpoint, make: Maker, out: Path) -> str:
    """The figure of one export, or how it failed."""
    out.mkdir()
    try:
        make(checkpoint, out)
        off = distance(run(out, "onnxruntime"), run(checkpoint.path, "pytorch"))
    except Exception as error:  # a graph that does not open or run is a result here
        return one_line(str(error).replace("|", "/"), 60)
    return f"{off:.0e}" if off <= RIGHT else f"**wrong: {off:.2g}**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cuts", default="none,scattered,attention")
    parser.add_argument("--models", default=",".join(NAMES))
    parser.add_argument("--optimum", metavar="PYTHON")
    asked = parser.parse_args()
    makers: dict[str, Maker] = {
        "ours": ours,
        "genai's builder": genai,
        "mobius": by_script(sys.executable, MOBIUS),
    }
    if asked.optimum:
        makers["optimum"] = by_script(asked.optimum, OPTIMUM)
    print(f"| model | cut | {' | '.join(makers)} |")
    print("|---" * (2 + len(makers)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for model in asked.models.split(","):
            work = Path(folder) / model
            with contextlib.redirect_stderr(io.StringIO()):
                original = Checkpoint.open(make_model(model, work))
            for cut in asked.cuts.split(","):
                place = Path(folder) / f"{model}-{cut}"
                pruned = original if cut == "none" else _cut(model, cut, original, place)
                found = [
                    judge(pruned, make, Path(f"{place}-{name}")) for name, make in makers.items()
                ]
                print(f"| {model} | {cut} | {' | '.join(found)} |", flush=True)


def _cut(model: str, cut: str, original: Checkpoint, place: Path) -> Checkpoint:
    return make_cell(model, cut, original, place).pruned


if __name__ == "__main__":
    main()
