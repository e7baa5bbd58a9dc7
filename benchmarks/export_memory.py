"""Time and memory of exports of one checkpoint, each in a process of its own, from one command.

    python benchmarks/export_memory.py [CHECKPOINT] [--specs gguf:F16 gguf:Q4_0]
        [--converter .../llama.cpp/convert_hf_to_gguf.py] [--repeats 1] [--folder DIR]

Without CHECKPOINT a synthetic one is made (--shape, --layers) and removed. Everything is measured
from outside: wall time from the start of a process until its files are on the disk (fsync), and
the most anonymous memory of it and its children, sampled. `cp` copies the checkpoint, with fsync,
in the same round, and once before the first, unmeasured: whoever came first would pay for a cold
page cache, which only root can drop. A model near the size of the memory never stays in it whole.

With --converter, llama.cpp's own converter makes F16, and llama_model_quantize of the installed
libllama (what llama-quantize calls, with its defaults) makes Q4_0 of that: its row is the time of
both and the larger of their peaks. The converter needs sentencepiece and what else it imports.
Ours does what a run does, without the calibration pass: it also hashes source and result, and
reads the file's table back. Predictions have 50 MB for the process of the command line that
exports in a run, the one here holds a third of that.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.make_synthetic import SHAPES, make_synthetic  # noqa: E402  # needs the path

from shortstack.artifact import ExportSpec  # noqa: E402
from shortstack.checkpoint import Checkpoint  # noqa: E402
from shortstack.export import exporter  # noqa: E402
from shortstack.footprint import measured  # noqa: E402

QUANTIZED = "Q4_0"
"""What llama.cpp's quantizer is asked for."""


@dataclass(frozen=True)
class Cost:
    """What one export took. None: this system does not tell."""

    wall_s: float
    peak_anon_bytes: int | None
    size_bytes: int

    def then(self, other: Cost) -> Cost:
        """Both, one after the other; the result is the second's."""
        peaks = [c.peak_anon_bytes for c in (self, other) if c.peak_anon_bytes is not None]
        return Cost(self.wall_s + other.wall_s, max(peaks, default=None), other.size_bytes)


@dataclass
class Row:
    """One line of the table: a cost for each round, and the predicted peak."""

    name: str
    predicted_bytes: int | None = None
    costs: list[Cost] = field(default_factory=list)


def run(command: Sequence[str | Path], out: Path, request: Mapping[str, Any] | None = None) -> Cost:
    """Run a command that fills the folder `out`, until its files are on the disk."""
    os.sync()  # what the last run left to write would slow this one
    with tempfile.TemporaryFile() as words, tempfile.TemporaryFile() as question:
        question.write(json.dumps(request or {}).encode())
        question.seek(0)
        process = subprocess.Popen(command, stdin=question, stdout=words, stderr=words)
        with measured(process.pid) as meter:
            code = process.wait()
            for file in files_of(out):
                settle(file)
        words.seek(0)
        if code:
            raise SystemExit(f"{command[1]} ended with {code}:\n{words.read().decode()[-2000:]}")
    seen = meter.footprint
    size = sum(file.stat().st_size for file in files_of(out))
    return Cost(seen.wall_s, seen.peak_anon_bytes, size)


def files_of(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def settle(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def spec_of(text: str) -> ExportSpec:
    """A spec such as gguf:Q4_0, or with options as in onnx:int4,imatrix=no."""
    target, *options = text.split(",")
    return ExportSpec.parse(target, **dict(option.split("=", 1) for option in options))


def export_here(request: Mapping[str, Any]) -> None:
    """In the measured process: our exporter."""
    spec = spec_of(request["spec"])
    checkpoint = Checkpoint.open(Path(request["checkpoint"]))
    exporter(spec.format).export(checkpoint, spec, Path(request["out"]))


def quantize_here(request: Mapping[str, Any]) -> None:
    """In the measured process: llama.cpp's quantizer with its own defaults."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    source, target = str(request["source"]).encode(), str(request["target"]).encode()
    if llama_cpp.llama_model_quantize(source, target, params):
        raise SystemExit("llama_model_quantize failed")


HERE: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "export": export_here,
    "quantize": quantize_here,
}


def fresh(out: Path) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    return out


def ours(checkpoint: Path, spec: str, out: Path) -> Cost:
    request = {"checkpoint": str(checkpoint), "spec": spec, "out": str(out)}
    return run([sys.executable, __file__, "--one", "export"], out, request)


def theirs(converter: Path, checkpoint: Path, converted: Path, out: Path) -> tuple[Cost, Cost]:
    """llama.cpp's converter to F16, and with its quantizer to Q4_0."""
    source = converted / "model.gguf"
    command: list[str | Path] = [sys.executable, converter]
    command += [checkpoint, "--outtype", "f16", "--outfile", source]
    whole = run(command, converted)
    request = {"source": str(source), "target": str(out / "model.gguf")}
    return whole, whole.then(
        run([sys.executable, __file__, "--one", "quantize"], out, request),
    )


def predicted(checkpoint: Checkpoint, spec: ExportSpec) -> int:
    """The peak without a calibration pass, which is not run here."""
    expected = exporter(spec.format).predict(checkpoint, spec)
    return expected.get("writing_ram_bytes", expected["peak_ram_bytes"])


def compare(
    source: Path, specs: Sequence[str], converter: Path | None, rounds: int, folder: Path
) -> list[Row]:
    """Everything once a round, in turn, so that a busy minute does not fall on one alone."""
    checkpoint = Checkpoint.open(source)
    rows = {"cp": Row("cp, durable")}
    for spec in specs:
        rows[spec] = Row(f"{spec}, ours", predicted(checkpoint, spec_of(spec)))
    if converter is not None:
        rows["F16"] = Row("gguf:F16, llama.cpp's converter")
        rows[QUANTIZED] = Row(f"gguf:{QUANTIZED}, converter and quantizer")
    out = folder / "out"
    copy: list[str | Path] = ["cp", "-r", "--reflink=never", source, out / "copy"]
    run(copy, fresh(out))
    for _ in range(rounds):
        copied = run(copy, fresh(out))
        rows["cp"].costs.append(Cost(copied.wall_s, None, copied.size_bytes))
        for spec in specs:
            rows[spec].costs.append(ours(source, spec, fresh(out)))
        if converter is not None:
            fresh(out)
            whole, quantized = theirs(converter, source, fresh(folder / "converted"), out)
            rows["F16"].costs.append(whole)
            rows[QUANTIZED].costs.append(quantized)
            shutil.rmtree(folder / "converted")
        shutil.rmtree(out)
    return list(rows.values())


def table(rows: Sequence[Row]) -> str:
    """Markdown: medians over the rounds, ratios within a round, the highest peak."""
    base = rows[0].costs
    lines = [
        "| export | size GB | time s | time / cp | peak anonymous MB | predicted MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        seconds = statistics.median(cost.wall_s for cost in row.costs)
        ratio = statistics.median(
            cost.wall_s / copied.wall_s for cost, copied in zip(row.costs, base, strict=True)
        )
        peaks = [c.peak_anon_bytes for c in row.costs if c.peak_anon_bytes is not None]
        cells = [
            row.name,
            f"{row.costs[0].size_bytes / 1e9:.2f}",
            f"{seconds:.1f}",
            f"{ratio:.2f}",
            megabytes(max(peaks, default=None)),
            megabytes(row.predicted_bytes),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def megabytes(n_bytes: int | None) -> str:
    return "" if n_bytes is None else f"{n_bytes / 1e6:,.0f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", help="default: a synthetic one")
    parser.add_argument("--specs", nargs="+", default=["gguf:F16", f"gguf:{QUANTIZED}"])
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="of the synthetic one, instead of its shape's")
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to write, default: the system's")
    parser.add_argument("--one", choices=HERE, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    if asked.one:
        HERE[asked.one](json.load(sys.stdin))
        return
    if asked.converter is None:
        print("SKIPPED: llama.cpp's converter and quantizer. Name it with --converter.\n")
    elif not asked.converter.is_file():
        raise SystemExit(f"{asked.converter} is no file. Name llama.cpp's convert_hf_to_gguf.py.")
    folder = Path(tempfile.mkdtemp(dir=asked.folder))
    try:
        source = asked.checkpoint
        if source is None:
            changed = {} if asked.layers is None else {"num_hidden_layers": asked.layers}
            source = folder / "checkpoint"
            make_synthetic(source, asked.shape, **changed)
        rows = compare(source, asked.specs, asked.converter, asked.repeats, folder)
        size = Checkpoint.open(source).n_bytes / 1e9
        print(f"{source.name}: {size:.2f} GB, {asked.repeats} rounds\n")
        print(table(rows))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
