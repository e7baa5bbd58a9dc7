"""Depth and bits together: which of them makes the better file of a size, the smaller of a quality.

    python -m benchmarks.double ORIGINAL [CUT...] --out OUT --text FILE [FILE...]
        [--bits 6 5 4.5 3.86 3.4] [--gguf F16 Q8_0 Q4_K_M ...] [--calibration FILE]
        [--limit 24] [--threads 1] [--megabytes 200 120 80 60 50] [--ratios 1.05 1.1 1.2 1.4]
        [--device cuda:0] [--learn-tokens 5000000]
    python -m benchmarks.double --records docs/results/double/compensated.json

Every model, the original and its (healed) cuts, in three kinds of file: *none*, 16 bits (F16);
*4-bit*, what people use (GGUF types); *packed*, `shortstack quantize --bits` and then
`shortstack export --to packed`. Sizes are of whole files, tokenizer and header included. The first
table has every file; the second, for each number of megabytes, the perplexity of each depth and
kind; the third, for each perplexity over the original's, the megabytes. Between two files of one
line log perplexity is straight in log size; outside of a line there is nothing. The best of a row
is bold. What OUT has already is kept. `--records` prints the tables of files that OUT/SET.json
lists.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rate_quality import add_where, made, scored

from shortstack.checkpoint import Checkpoint
from shortstack.devices.report.merged.front import dominates

KINDS = {"none": ("F16", "Q8_0"), "4-bit": ("Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M")}
"""GGUF types of a line each; the line of what is not quantized ends in the nearly exact Q8_0."""


@dataclass(frozen=True)
class File:
    layers: int
    kind: str
    name: str
    megabytes: float
    perplexity: float

    @property
    def line(self) -> tuple[int, str]:
        return self.layers, self.kind


def kind_of(form: str) -> str:
    if form.startswith("packed"):
        return "packed"
    return next(kind for kind, types in KINDS.items() if form.partition(":")[2] in types)


def files_of(asked: argparse.Namespace, model: Path) -> dict[str, list[File]]:
    """Set -> files of one model; a set's first is the model itself in float32, of no size."""
    mine = copy.copy(asked)
    mine.model, mine.out = model, asked.out / model.name
    mine.out.mkdir(parents=True, exist_ok=True)
    mine.onnx, mine.quantized = (), ()
    forms = made(mine)
    layers = Checkpoint.open(model).n_layers
    found: dict[str, list[File]] = {}
    for name, summaries in scored(mine, [path for path, _ in forms.values()]).items():
        whole = summaries.pop(str(model))
        rows = [File(layers, "float32", "float32", math.inf, whole["estimate"])]
        for form, (path, size) in forms.items():
            told = next(s for place, s in summaries.items() if place.startswith(str(path)))
            rows.append(File(layers, kind_of(form), form, size / 1e6, told["estimate"]))
        found[name] = rows
    return found


def between(line: Sequence[tuple[float, float]], at: float) -> float | None:
    """y at x by straight lines through the logarithms of points (x, y); None outside of them."""
    points = sorted((math.log(x), math.log(y)) for x, y in line)
    wanted = math.log(at)
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= wanted <= x1:
            share = (wanted - x0) / (x1 - x0) if x1 > x0 else 0.0
            return math.exp(y0 + share * (y1 - y0))
    return None


def lines(files: Iterable[File]) -> dict[tuple[int, str], list[File]]:
    """(layers, kind) -> its files that no other of the line beats in size or perplexity without
    losing in the other."""
    found: dict[tuple[int, str], list[File]] = {}
    for file in sorted(files, key=lambda one: (-one.layers, one.kind, -one.megabytes)):
        if file.kind != "float32":
            found.setdefault(file.line, []).append(file)
    for key, line in found.items():
        costs = [(file.megabytes, file.perplexity) for file in line]
        found[key] = [
            file
            for file, own in zip(line, costs, strict=True)
            if not any(dominates(other, own) for other in costs)
        ]
    return found


def table(
    head: str, rows: Sequence[tuple[str, list[float | None]]], names: Sequence[str], digits: int
) -> list[str]:
    """Markdown; the least of each row is bold."""
    made = [f"| {head} | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for title, figures in rows:
        least = min((f for f in figures if f is not None), default=None)
        cells = []
        for figure in figures:
            told = "-" if figure is None else f"{figure:.{digits}f}"
            cells.append(f"**{told}**" if figure is not None and figure == least else told)
        made.append(f"| {title} | {' | '.join(cells)} |")
    return made


def tables(files: Sequence[File], asked: argparse.Namespace) -> list[str]:
    original = max(files, key=lambda one: one.layers).layers
    whole = next(f for f in files if f.kind == "float32" and f.layers == original).perplexity
    told = ["| layers | kind | file | MB | perplexity | over the original |"]
    told.append("|---:|---|---|---:|---:|---:|")
    for file in sorted(files, key=lambda one: (-one.layers, -one.megabytes)):
        size = "" if math.isinf(file.megabytes) else f"{file.megabytes:.1f}"
        cells = [str(file.layers), file.kind, file.name, size, f"{file.perplexity:.2f}"]
        told.append(f"| {' | '.join([*cells, f'{file.perplexity / whole:.3f} x'])} |")
    by_line = lines(files)
    names = [f"{layers} layers, {kind}" for layers, kind in by_line]
    size_rows: list[tuple[str, list[float | None]]] = []
    for size in asked.megabytes:
        found = [between([(f.megabytes, f.perplexity) for f in x], size) for x in by_line.values()]
        size_rows.append((f"{size:g} MB", [None if f is None else f / whole for f in found]))
    told += ["", "Perplexity over the original's at equal size:", ""]
    told += table("file of", size_rows, names, 3)
    ratio_rows: list[tuple[str, list[float | None]]] = []
    for ratio in asked.ratios:
        wanted = [
            between([(f.perplexity, f.megabytes) for f in line], ratio * whole)
            for line in by_line.values()
        ]
        ratio_rows.append((f"{ratio:g} x", wanted))
    told += ["", "Megabytes at equal perplexity:", ""]
    return told + table("perplexity", ratio_rows, names, 1)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", type=Path, nargs="*", help="the original, then its cuts")
    parser.add_argument("--records", type=Path, help="print the tables of OUT/SET.json")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--text", type=Path, nargs="+")
    parser.add_argument("--bits", type=float, nargs="+", default=[6, 5, 4.5, 3.86, 3.4])
    parser.add_argument("--gguf", nargs="+", default=[t for types in KINDS.values() for t in types])
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--limit", type=int)
    add_where(parser)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[200, 120, 90, 75, 60, 50])
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.05, 1.1, 1.2, 1.3, 1.5])
    asked = parser.parse_args(words)
    if not asked.records and not (asked.models and asked.out and asked.text):
        parser.error("name a model, --out and --text; or --records")
    return asked


def recorded(file: Path) -> list[File]:
    """What `main` wrote of a set."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    return [File(**row | {"megabytes": row["megabytes"] or math.inf}) for row in rows]


def main() -> None:
    asked = arguments()
    if asked.records:
        print("\n".join(tables(recorded(asked.records), asked)))
        return
    asked.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[File]] = {}
    for model in asked.models:
        for name, files in files_of(asked, model).items():
            found.setdefault(name, []).extend(files)
    for name, files in found.items():
        rows = [
            vars(file) | {"megabytes": None if math.isinf(file.megabytes) else file.megabytes}
            for file in files
        ]
        (asked.out / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(f"\n{name}\n")
        print("\n".join(tables(files, asked)))


if __name__ == "__main__":
    main()
