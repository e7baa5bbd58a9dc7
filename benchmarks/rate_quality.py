"""Perplexity against bits a weight: packed files, GGUF types and ONNX, from the same weights.

    python -m benchmarks.rate_quality MODEL --out OUT --text FILE [FILE...] [--limit 24]
        [--quantized FOLDER...] [--bits 5 4.5 3.86] [--calibration FILE] [--threads 1]
        [--device cuda:0] [--learn-tokens 5000000]

Bits are those of the whole file, tokenizer and header included: bytes x 8 / weights. A packed point
is a folder of `shortstack quantize` (named, or made at `--bits`), packed by `shortstack export`; it
is scored in PyTorch, whose weights are the packed ones bit for bit. Every other form is scored in
its own runtime. For each of them the table says how many bits a packed file of equal perplexity
takes: straight lines through log perplexity between the packed points that no other one beats in
both; `at most` the bits of the smallest of them for a form that is worse than all, nothing for one
that is better than all.
What OUT has already is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.checkpoint import Checkpoint
from shortstack.devices.report.merged.front import dominates
from shortstack.devices.report.merged.plots import Axes, Dot, Series, chart

GGUF = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL", "Q3_K_M", "IQ3_S")
ONNX = ("int8", "int4")
STYLE = """<style>text{font:12px sans-serif;fill:#333}.chart-grid{stroke:#ddd}circle{stroke:none}
.s0{fill:#c2410c;stroke:#c2410c}.s1{fill:#475569;stroke:#475569}.s2{fill:#3f8f4f;stroke:#3f8f4f}
polyline{fill:none!important;stroke-width:2}.whisker{stroke:#333}</style>"""


@dataclass(frozen=True)
class Point:
    name: str
    bits: float
    perplexity: float
    low: float
    high: float

    @property
    def packed(self) -> bool:
        return self.name.startswith("packed")


def shortstack(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "shortstack", *map(str, words), "--quiet"], check=True)


def made(asked: argparse.Namespace) -> dict[str, tuple[Path, int]]:
    """Name -> (what is scored, bytes of the file)."""
    found: dict[str, tuple[Path, int]] = {}
    for to in (*(f"gguf:{kind}" for kind in asked.gguf), *(f"onnx:{kind}" for kind in asked.onnx)):
        out = asked.out / to.replace(":", "-")
        if not out.exists():
            words = ("--to", to, "-o", out, "--threads", asked.threads)
            shortstack("export", asked.model, *words, "--max-perplexity-ratio", 100)
        told = json.loads((out / "shortstack.json").read_text(encoding="utf-8"))
        found[to] = out, int(told["artifact"]["size_bytes"])
    for folder in (*asked.quantized, *(quantized(asked, bits) for bits in asked.bits)):
        out = asked.out / f"{folder.name}-packed"
        if not out.exists():
            words = ("-o", out, "--threads", asked.threads, "--option", "coder=smallest")
            shortstack("export", folder, "--to", "packed", *words)
        (file,) = out.glob("*.safetensors")
        found[f"packed {folder.name}"] = folder, file.stat().st_size
    return found


def quantized(asked: argparse.Namespace, bits: float) -> Path:
    out: Path = asked.out / f"{bits:g}-bits"
    if not out.exists():
        text = () if asked.calibration is None else ("--text", asked.calibration)
        learn = ("--learn-tokens", asked.learn_tokens) if asked.learn_tokens else ()
        words = ("--bits", bits, *text, *learn, "--device", asked.device)
        shortstack("quantize", asked.model, *words, "-o", out)
    return out


def scored(asked: argparse.Namespace, models: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Set -> {path of a model: its summary}; the original's under its own path."""
    out = asked.out / "eval"
    words = [*models, "--against", asked.model, "-o", out, "--threads", asked.threads]
    words += ["--device", asked.device]
    words += [word for text in asked.text for word in ("--text", text)]
    shortstack("eval", *words, *(("--limit", asked.limit) if asked.limit else ()))
    told = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    # the record holds names alone; models stand in it as they were given, the original first
    places = {
        one["label"]: str(place)
        for one, place in zip(told["models"], (asked.model, *models), strict=True)
    }
    found: dict[str, dict[str, Any]] = {one["name"]: {} for one in told["sets"]}
    for result in told["results"]:
        found[result["set"]][places[result["model"]]] = result["summary"]["perplexity"]
    return found


def best_of(points: Sequence[Point]) -> list[Point]:
    """Those that no other one beats in bits or perplexity without losing in the other."""
    costs = [(point.bits, point.perplexity) for point in points]
    return [
        point
        for point, own in zip(points, costs, strict=True)
        if not any(dominates(other, own) for other in costs)
    ]


def at_equal_quality(point: Point, packed: Sequence[Point]) -> float | None:
    """Bits of a packed file with the point's perplexity; None outside of the packed points."""
    line = sorted(packed, key=lambda one: one.perplexity)
    for first, second in zip(line, line[1:], strict=False):
        if first.perplexity <= point.perplexity <= second.perplexity:
            width = math.log(second.perplexity / first.perplexity)
            share = math.log(point.perplexity / first.perplexity) / width if width else 0.0
            return first.bits + share * (second.bits - first.bits)
    return None


def cells_at_equal_quality(point: Point, packed: Sequence[Point]) -> list[str]:
    """Bits of a packed file at the point's perplexity, and by what share it is smaller."""
    equal, told = at_equal_quality(point, packed), ("", "")
    worst = max(packed, key=lambda one: one.perplexity, default=None)
    if worst is not None and not point.packed and point.perplexity > worst.perplexity:
        equal, told = worst.bits, ("at most ", "at least ")
    if equal is None or point.packed:
        return ["-", "-"]
    return [f"{told[0]}{equal:.2f}", f"{told[1]}{1 - equal / point.bits:.0%}"]


def table(points: Sequence[Point], original: float) -> list[str]:
    lines = [
        "| | bits a weight | perplexity | over float32 | packed, equal perplexity | smaller by |"
    ]
    lines.append("|---|---:|---:|---:|---:|---:|")
    packed = best_of([point for point in points if point.packed])
    for point in sorted(points, key=lambda one: -one.bits):
        cells = [point.name, f"{point.bits:.2f}"]
        cells += [f"{point.perplexity:.2f} ({point.low:.2f} to {point.high:.2f})"]
        cells += [f"{100 * (point.perplexity / original - 1):+.1f} %"]
        cells += cells_at_equal_quality(point, packed)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def drawn(name: str, points: Sequence[Point]) -> str:
    kinds = {"packed": "packed", "gguf": "GGUF", "onnx": "ONNX"}
    series = []
    for start, title in kinds.items():
        own = sorted((p for p in points if p.name.startswith(start)), key=lambda one: one.bits)
        dots = tuple(Dot(p.bits, p.perplexity, p.name) for p in own)
        series += [Series(title, dots, joined=start == "packed")] if dots else []
    told = ", ".join(f"{number} {one.name}" for number, one in enumerate(series, 1))
    axes = Axes(f"perplexity of {name}: {told}", "bits a weight, whole file")
    picture = str(chart(f"Perplexity of {name} against bits", "", series, Axes(axes.y, axes.x)))
    return picture.replace(">", f' xmlns="http://www.w3.org/2000/svg">{STYLE}', 1)


def add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="of rounding, learning and scoring")
    parser.add_argument("--learn-tokens", type=int, default=0, help="of `shortstack quantize`")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--quantized", type=Path, nargs="*", default=[])
    parser.add_argument("--bits", type=float, nargs="*", default=[])
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--gguf", nargs="*", default=GGUF)
    parser.add_argument("--onnx", nargs="*", default=ONNX)
    add_where(parser)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    forms = made(asked)
    weights = Checkpoint.open(asked.model).n_params
    for name, summaries in scored(asked, [path for path, _ in forms.values()]).items():
        original = summaries.pop(str(asked.model))
        points = []
        for form, (path, size) in forms.items():
            found = next(told for place, told in summaries.items() if place.startswith(str(path)))
            points.append(
                Point(form, 8 * size / weights, found["estimate"], found["low"], found["high"])
            )
        print(f"\n{name}: float32 {original['estimate']:.2f}\n")
        print("\n".join(table(points, original["estimate"])))
        (asked.out / f"{name}.svg").write_text(drawn(name, points), encoding="utf-8")


if __name__ == "__main__":
    main()
