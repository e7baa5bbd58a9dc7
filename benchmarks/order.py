"""Fewer layers or fewer bits, and which first: perplexity against file size.

    python -m benchmarks.order MODEL --text T --test ROWS.jsonl --out OUT [--drop 4 8]
        [--tokens 12288] [--types Q8_0 Q6_K Q5_K_M Q4_K_M Q4_0 Q3_K_M] [--first Q4_0]

Every model as every GGUF type: the original (fewer bits, no pruning), and for each of `--drop` a
run of neighbours cut out, bare and healed on T towards the original. For each type of `--first` the
other order, too: the original quantized, opened again, cut, healed towards the original, quantized
again as the same type. Files are scored in llama.cpp on the same windows of ROWS, which are of
neither T nor anything else that was fitted on. Steps are kept in OUT when the command is run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.depth import open_original

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.export import exporter


def shortstack(*arguments: object) -> dict[str, Any]:
    """Run a command; its answer."""
    command = [sys.executable, "-m", "shortstack", *map(str, arguments), "--json", "--quiet"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def cut(asked: argparse.Namespace, source: Path | str, drop: int, out: Path) -> tuple[Path, Path]:
    """A bare cut of a model by the plan made on the original, and the same healed."""
    bare, healed = out / "bare", out / "healed"
    plan = asked.out / f"plan-{drop}.json"
    if not plan.is_file():
        how = ("--drop", drop, "--method", "cosine-run", "--text", asked.text)
        shortstack("plan", asked.model, *how, "-o", plan)
    if not bare.is_dir():
        shortstack("prune", source, "--plan", plan, "-o", bare)
    if not healed.is_dir():
        budget = ("--tokens", asked.tokens, "--rate", asked.rate, "--window-tokens", 256)
        steps = ("--batch-windows", 2, "--eval-steps", 10**6)
        shortstack(
            *("heal", bare, "--teacher", asked.model, "--text", asked.text),
            *(*budget, *steps, "-o", healed),
        )
    return bare, healed


def gguf(asked: argparse.Namespace, source: Path | str, kind: str, out: Path) -> Path:
    """A model as one GGUF file, not compared with it: the losses are what is measured here."""
    folder = out / kind
    if not folder.is_dir():
        checkpoint = Checkpoint.open(Path(source))
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        exporter("gguf").export(checkpoint, ExportSpec.parse(f"gguf:{kind}"), partial)
        partial.rename(folder)
    return next(folder.glob("*.gguf"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="to choose and heal on")
    parser.add_argument("--test", type=Path, required=True, help="to score on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--drop", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--tokens", type=int, default=12288)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--windows", type=int, default=32)
    types = ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M"]
    parser.add_argument("--types", nargs="+", default=types)
    parser.add_argument("--first", nargs="*", default=["Q4_0"])
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    open_original(asked.model, asked.out)
    asked.model = str(asked.out / "model")
    files: dict[str, Path] = {}
    for kind in asked.types:
        files[f"original {kind}"] = gguf(asked, asked.model, kind, asked.out / "original")
    for drop in asked.drop:
        bare, healed = cut(asked, asked.model, drop, asked.out / f"cut-{drop}")
        for kind in asked.types:
            for name, model in (("bare", bare), ("healed", healed)):
                title = f"{drop} dropped, {name}, {kind}"
                files[title] = gguf(asked, model, kind, asked.out / f"cut-{drop}-{name}")
        for kind in asked.first:
            source = files[f"original {kind}"]
            _, healed = cut(asked, source, drop, asked.out / f"{kind}-first-{drop}")
            again = gguf(asked, healed, kind, asked.out / f"{kind}-first-{drop}")
            files[f"{kind} first, {drop} dropped, healed, {kind}"] = again
    told = shortstack(
        *("eval", *files.values(), "--text", asked.test, "--limit", asked.windows),
        *("-o", asked.out / "eval"),
    )
    found = [row["summary"]["perplexity"] for row in told["results"]]
    order = sorted(zip(files.items(), found, strict=True), key=lambda p: p[0][1].stat().st_size)
    print("| file | MB | perplexity (95 %) |\n|---|---:|---:|")
    for (title, file), value in order:
        interval = f"{value['low']:.2f} to {value['high']:.2f}"
        print(
            f"| {title} | {file.stat().st_size / 1e6:.1f} | {value['estimate']:.2f} ({interval}) |"
        )


if __name__ == "__main__":
    main()
