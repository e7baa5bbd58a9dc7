"""What an importance matrix buys: the same types of GGUF with and without one.

    python -m benchmarks.importance MODEL [--types Q4_0,IQ4_NL] [--calibration 32] [--windows 4]

The matrix is computed on the calibration part of the text, the distance to float32 on its test
part; no text is in both.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks.racing import windows

from shortstack.artifact import ExportSpec
from shortstack.certify import make_reference, verify
from shortstack.errors import ShortstackError
from shortstack.export import exporter
from shortstack.intake import open_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", default="spdx")
    parser.add_argument("--types", default="Q4_0,IQ4_NL,Q3_K_M,Q2_K")
    parser.add_argument("--calibration", type=int, default=32, help="windows of 256 tokens")
    parser.add_argument("--windows", type=int, default=4, help="windows of 256 tokens")
    asked = parser.parse_args()
    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        checkpoint = open_model(asked.model, work / "model")
        known = windows(checkpoint, asked.text, 256, asked.calibration, "calibration")
        unseen = windows(checkpoint, asked.text, 256, asked.windows)
        reference = make_reference(checkpoint, unseen, work / "reference.npy", threads=threads)
        print("| type | imatrix | KL | perplexity, times float32's | MB |")
        print("|---|---|---|---|---|")
        for kind in asked.types.split(","):
            for wanted in ("no", "yes"):
                out = work / f"{kind}-{wanted}"
                out.mkdir()
                spec = ExportSpec.parse(f"gguf:{kind}", imatrix=wanted)
                try:
                    artifact = exporter("gguf").export(checkpoint, spec, out, calibration=known)
                except ShortstackError as refusal:
                    print(f"| {kind} | {wanted} | refused: {refusal} | | |")
                    continue
                found = verify(artifact, unseen, reference, threads=threads)
                ratio = found.perplexity / found.reference_perplexity
                size = artifact.size_bytes / 1e6
                print(
                    f"| {kind} | {wanted} | {found.kl:.4f} | {ratio:.3f} | {size:.1f} |", flush=True
                )


if __name__ == "__main__":
    main()
