"""Fewer layers or fewer bits, and which first: perplexity against file size.

    python -m benchmarks.order MODEL --text T --test ROWS.jsonl --out OUT [--drop 4 8]
        [--general G ...] [--tokens 12288] [--jobs 1] [--first Q4_0]
        [--types Q8_0 Q6_K Q5_K_M Q4_K_M Q4_0 Q3_K_M]

Every model as every GGUF type: the original (fewer bits, no pruning), and for each of `--drop` a
run of neighbours cut out, bare and healed on T (and G) towards the original. For each type of
`--first` the other order, too: the original quantized, opened again, cut, healed towards the
original, quantized again as the same type. Files are scored in llama.cpp, or with `--device` in
PyTorch, on the same windows of ROWS, which are of neither T nor anything else that was fitted on.
Steps are kept in OUT when the command is run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.depth import open_original

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.evaluate.metrics import perplexity
from shortstack.export import exporter
from shortstack.intake import open_model
from shortstack.prune.heal.data import packed_windows
from shortstack.tokens import Encoder

LENGTH = 512
Scores = list[tuple[float, int]]
"""Summed nats and number of tokens of each window."""


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
    parser.add_argument("--device", help="score in PyTorch there, not in llama.cpp, e.g. cuda:0")
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
    score = in_llama_cpp if asked.device is None else in_torch
    print(table(files, score(asked, files)))


def in_llama_cpp(asked: argparse.Namespace, files: dict[str, Path]) -> dict[str, Scores]:
    """Nats and tokens of each window, by what llama.cpp computes of each file."""
    digests = {title: digest(file) for title, file in files.items()}
    once = {digests[title]: file for title, file in files.items()}  # what eval takes for one model
    shortstack(
        *("eval", *once.values(), "--text", asked.test, "--limit", asked.windows),
        *("-o", asked.out / "eval"),
    )
    told = json.loads((asked.out / "eval" / "eval.json").read_text(encoding="utf-8"))
    found = {
        key: [(row["nats"], row["n_tokens"]) for row in result["rows"]]
        for key, result in zip(once, told["results"], strict=True)
    }
    return {title: found[digests[title]] for title in files}


def in_torch(asked: argparse.Namespace, files: dict[str, Path]) -> dict[str, Scores]:
    """The same of the files' weights, dequantized, in PyTorch on a device. llama.cpp rounds the
    activations, too, which this leaves out."""
    from shortstack.evaluate.perplexity import open_documents
    from shortstack.evaluate.torch_scorer import TorchScorer

    documents = list(open_documents(asked.test))
    found: dict[str, Scores] = {}
    for title, file in files.items():
        with tempfile.TemporaryDirectory(dir=asked.out) as folder:
            checkpoint = open_model(str(file), Path(folder) / "model")
            rows = packed_windows(documents, Encoder(checkpoint).encode, LENGTH)[: asked.windows]
            with TorchScorer(checkpoint, device=asked.device) as scorer:
                found[title] = [(s.sum_nats, s.n_tokens) for s in scorer.nats(rows)]
    return found


def table(files: dict[str, Path], scores: dict[str, Scores]) -> str:
    """Markdown, smallest file first; in brackets 95 % over windows. The last column compares a
    pruned file with the original that is nearest in size, window by window."""
    sizes = {title: file.stat().st_size for title, file in files.items()}
    originals = [title for title in files if title.startswith("original ")]
    lines = ["| file | MB | perplexity | against the original of nearest size |"]
    lines.append("|---|---:|---:|---|")
    for title in sorted(files, key=sizes.__getitem__):
        nearest = min(originals, key=lambda other: abs(sizes[other] - sizes[title]))
        against = ""
        if title not in originals:
            mean, low, high = ratio(scores[title], scores[nearest])
            kind = nearest.removeprefix("original ")
            against = (
                f"{kind}, {sizes[nearest] / 1e6:.1f} MB: {mean:.2f} x ({low:.2f} to {high:.2f})"
            )
        own = perplexity(*map(list, zip(*scores[title], strict=True)))
        shown = f"{own.estimate:.2f} ({own.low:.2f} to {own.high:.2f})"
        lines.append(f"| {title} | {sizes[title] / 1e6:.1f} | {shown} | {against} |")
    return "\n".join(lines)


def ratio(ours: Scores, theirs: Scores) -> tuple[float, float, float]:
    """Of two perplexities on the same windows of equal length, and its 95 % interval."""
    pairs = zip(ours, theirs, strict=True)
    gaps = [a / n - b / m for (a, n), (b, m) in pairs]
    mean = statistics.fmean(gaps)
    half = 1.96 * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


if __name__ == "__main__":
    main()
