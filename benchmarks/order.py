"""Fewer layers or fewer bits, and which first: perplexity against file size.

    python -m benchmarks.order MODEL --text T --test ROWS.jsonl --out OUT [--drop 4 8]
        [--general G ...] [--tokens 12288] [--jobs 1] [--first Q4_0]
        [--types Q8_0 Q6_K Q5_K_M Q4_K_M Q4_0 Q3_K_M]

Every model as every GGUF type: the original (fewer bits, no pruning), and for each of `--drop` a
run of neighbours cut out, bare and healed on T (and G) towards the original. For each type of
`--first` the other order, too: the original quantized, opened again, cut, healed towards the
original, quantized again as the same type. Files are scored in llama.cpp on the same windows of
ROWS, which are of neither T nor anything else that was fitted on. Steps are kept in OUT when the
command is run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
    if not bare.is_dir():
        shortstack("prune", source, "--plan", plan_of(asked, drop), "-o", bare)
    if not healed.is_dir():
        general = [word for name in asked.general for word in ("--general", name)]
        budget = ("--tokens", asked.tokens, "--rate", asked.rate)
        steps = ("--window-tokens", asked.window_tokens, "--batch-windows", asked.batch_windows)
        shortstack(
            *("heal", bare, "--teacher", asked.model, "--text", asked.text, *general),
            *(*budget, *steps, "--eval-steps", asked.eval_steps, "-o", healed),
        )
    return bare, healed


def plan_of(asked: argparse.Namespace, drop: int) -> Path:
    plan: Path = asked.out / f"plan-{drop}.json"
    if not plan.is_file():
        how = ("--drop", drop, "--method", "cosine-run", "--text", asked.text)
        shortstack("plan", asked.model, *how, "-o", plan)
    return plan


def gguf(source: Path | str, kind: str, out: Path) -> Path:
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


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="to choose and heal on")
    parser.add_argument("--test", type=Path, required=True, help="to score on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--drop", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--tokens", type=int, default=12288)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--general", nargs="*", default=[], help="other text to heal on")
    parser.add_argument("--window-tokens", type=int, default=256)
    parser.add_argument("--batch-windows", type=int, default=2)
    parser.add_argument("--eval-steps", type=int, default=10**6)
    parser.add_argument("--jobs", type=int, default=1, help="models healed at a time")
    parser.add_argument("--windows", type=int, default=32)
    types = ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M"]
    parser.add_argument("--types", nargs="+", default=types)
    parser.add_argument("--first", nargs="*", default=["Q4_0"])
    return parser.parse_args()


def main() -> None:
    asked = options()
    asked.out.mkdir(parents=True, exist_ok=True)
    open_original(asked.model, asked.out)
    asked.model = str(asked.out / "model")
    files: dict[str, Path] = {}
    for kind in dict.fromkeys([*asked.types, *asked.first]):
        files[f"original {kind}"] = gguf(asked.model, kind, asked.out / "original")
    wanted: dict[str, tuple[str | Path, int, Path]] = {}
    for drop in asked.drop:
        plan_of(asked, drop)
        wanted[f"{drop} dropped"] = (asked.model, drop, asked.out / f"cut-{drop}")
        for kind in asked.first:
            title = f"{kind} first, {drop} dropped"
            wanted[title] = (files[f"original {kind}"], drop, asked.out / f"{kind}-first-{drop}")
    with ThreadPoolExecutor(asked.jobs) as pool:
        made = dict(zip(wanted, pool.map(lambda w: cut(asked, *w), wanted.values()), strict=True))
    for title, (bare, healed) in made.items():
        first = title.partition(" first")[0]
        for kind in [first] if first in asked.first else asked.types:
            for model in (bare, healed):
                folder = model.with_name(f"{model.name}-gguf")
                files[f"{title}, {model.name}, {kind}"] = gguf(model, kind, folder)
    digests = {title: digest(file) for title, file in files.items()}
    once = {digests[title]: file for title, file in files.items()}  # what eval takes for one model
    told = shortstack(
        *("eval", *once.values(), "--text", asked.test, "--limit", asked.windows),
        *("-o", asked.out / "eval"),
    )
    perplexities = [row["summary"]["perplexity"] for row in told["results"]]
    found = dict(zip(once, perplexities, strict=True))
    print("| file | MB | perplexity (95 %) |\n|---|---:|---:|")
    for title, file in sorted(files.items(), key=lambda item: item[1].stat().st_size):
        value = found[digests[title]]
        interval = f"{value['low']:.2f} to {value['high']:.2f}"
        print(
            f"| {title} | {file.stat().st_size / 1e6:.1f} | {value['estimate']:.2f} ({interval}) |"
        )


if __name__ == "__main__":
    main()
