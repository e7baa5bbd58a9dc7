"""Cut a real model every way that docs/support.md lists, and hold every artifact to its proof.

    python -m benchmarks.real_cuts MODEL [--text spdx] [--windows 2] [--length 256] [--repeats 8]

Then the point of removing sub-blocks: does the file without four attentions decode faster than the
original's, and does it compute what PyTorch does? Timed in turn, every run in a fresh process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

from benchmarks.racing import race, windows

from shortstack.artifact import Artifact, ExportSpec
from shortstack.certify import make_reference, verify
from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.export import exporter
from shortstack.intake import open_model
from shortstack.prune import PrunePlan, apply_plan
from shortstack.prune.plan import parse_removal
from shortstack.verification import Bounds

CALIBRATION_WINDOWS = 8
TARGETS = ("gguf:F16", "gguf:Q8_0", "onnx:fp32", "onnx:fp16", "onnx:int8", "onnx:int4")


def cuts(depth: int) -> dict[str, str]:
    quarter = depth // 4
    return {
        "none": "",
        "first": "0",
        "middle": f"{depth // 2}",
        "last": f"{depth - 1}",
        "scattered": f"{quarter},{depth // 2},{depth * 3 // 4}",
        "one period": f"{depth // 2}-{depth // 2 + 3}",
        "attention": f"{quarter}.attention",
        "MLP": f"{quarter}.mlp",
        "four attentions": ",".join(f"{depth // 2 + i}.attention" for i in range(0, 8, 2)),
    }


def cut(original: Checkpoint, name: str, folder: Path) -> Checkpoint:
    if not cuts(original.n_layers)[name]:
        return original
    gone = parse_removal(cuts(original.n_layers)[name])
    folder.mkdir()
    plan = PrunePlan(
        original.n_layers, gone.layers, "explicit", attention=gone.attention, mlp=gone.mlp
    )
    return apply_plan(original, plan, folder)


def prove(
    checkpoint: Checkpoint,
    work: Path,
    texts: list[list[int]],
    known: list[list[int]],
    name: str,
) -> list[Artifact]:
    """Export to every target, print a line of each artifact's figures."""
    reference = make_reference(checkpoint, texts, work / "reference.npy", threads=_cores())
    made = []
    for target in TARGETS:
        out = work / f"{name}-{target}".replace(":", "-").replace(" ", "-")
        out.mkdir()
        spec = ExportSpec.parse(target)
        try:
            artifact = exporter(spec.format).export(checkpoint, spec, out, calibration=known)
        except ShortstackError as refusal:
            print(f"| {name} | {target} | refused: {refusal} | | | |", flush=True)
            continue
        found = verify(artifact, texts, reference, threads=_cores())
        bounds = Bounds.of(spec, max_perplexity_ratio=1.5)
        verdict = "; ".join(found.failures(bounds)) or "passed"
        print(
            f"| {name} | {target} | {found.kl_prefill:.2g} | {found.kl_decode:.2g} "
            f"| {found.top1:.1%} | {artifact.size_bytes / 1e6:.1f} | {verdict} |",
            flush=True,
        )
        made.append(artifact)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", default="spdx")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--cuts", default="", help="some of the names, by commas")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        original = open_model(asked.model, work / "model")
        texts = windows(original, asked.text, asked.length, asked.windows)
        known = windows(original, asked.text, asked.length, CALIBRATION_WINDOWS, "calibration")
        print("| cut | target | KL prefill | KL decode | top-1 | MB | proof |")
        print("|---|---|---|---|---|---|---|")
        kept: dict[str, Path] = {}
        for name in asked.cuts.split(",") if asked.cuts else cuts(original.n_layers):
            checkpoint = cut(original, name, work / f"pruned-{name}".replace(" ", "-"))
            for artifact in prove(checkpoint, work, texts, known, name):
                if name in ("none", "four attentions"):
                    kept[f"{artifact.spec.slug}, {name}"] = artifact.path
                else:
                    _remove(artifact.path)
        _race(kept, texts[0], asked.repeats)


def _race(kept: dict[str, Path], tokens: list[int], repeats: int) -> None:
    print("\n| target | original TPOT ms | without four attentions | decode speed |")
    print("|---|---|---|---|")
    for slug in dict.fromkeys(name.split(", ")[0] for name in kept):
        pair = {name: kept[f"{slug}, {name}"] for name in ("none", "four attentions")}
        runtime = "llama.cpp" if slug.startswith("gguf") else "onnxruntime"
        seconds = race(pair, tokens, len(tokens) // 2, repeats, runtime)
        before, after = seconds["none"], seconds["four attentions"]
        ratio = statistics.median(a / b for a, b in zip(before, after, strict=True))
        print(
            f"| {slug} | {1e3 * statistics.median(before):.2f} "
            f"| {1e3 * statistics.median(after):.2f} | {ratio:.3f} |",
            flush=True,
        )


def _remove(path: Path) -> None:
    for file in path.iterdir() if path.is_dir() else [path]:
        file.unlink()


def _cores() -> int:
    return os.cpu_count() or 1


if __name__ == "__main__":
    main()
