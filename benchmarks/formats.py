"""What depth buys in every format: one shape at several depths, on a card, in one sitting.

    python -m benchmarks.formats make MODELS --big DISK [--layers 32 16 24 12]
    python -m benchmarks.formats bench MODELS --big DISK --out OUT --lane pytorch --device cuda:0
    shortstack report OUT -o PAGE

`make` writes a Llama-2-7B shape with random weights, cuts its middle out with `shortstack prune`,
and exports every depth as GGUF (into DISK) and ONNX (beside the checkpoints). Speed does not depend
on the values of weights; these files answer nothing and are not certified, which their records say.
`bench` runs campaigns of `shortstack bench`, the most wanted first; run again, it goes on with what
is missing, and `--minutes` says when it stops starting more. Lanes may run side by side on cards of
their own: `pytorch`, `gguf`, `onnx`; `--only graph-32-16-b1 onnx-32-16-b1` runs campaigns by name.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from benchmarks.make_synthetic import SHAPES, make_synthetic

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.export import exporter

GGUF = ("Q4_0", "Q4_K_M", "Q8_0", "F16")  # the largest last: quantizing takes a scratch file
ONNX = {
    "fp16": {},
    "int4": {"imatrix": "no", "head": "int4", "wide": "none", "activations": "float16"},
}
LANES = ("pytorch", "gguf", "onnx")
WEIGHTS = ("bnb-int8", "bnb-nf4", "torchao-int4", "awq-int4")
"""Forms that people load a checkpoint in (docs/harness.md)."""
WITHOUT_GRAPH = frozenset({"bnb-int8"})
"""Those that no CUDA graph can hold (docs/pytorch.md); the others are measured with one, too."""


def checkpoint(models: Path, layers: int) -> Path:
    return models / f"{layers}-layers"


def gguf(big: Path, layers: int, precision: str) -> Path:
    return big / f"{layers}-layers-{precision}.gguf"


def onnx(models: Path, layers: int, precision: str) -> Path:
    return models / f"{layers}-layers-{precision}"


def cut(whole: Path, layers: int, out: Path) -> None:
    """Keep as many layers at both ends, as published cuts by influence nearly do."""
    depth = Checkpoint.open(whole).n_layers
    first = layers - layers // 2
    words = ["prune", str(whole), "--drop", f"{first}-{first + depth - layers - 1}", "-o", str(out)]
    subprocess.run([sys.executable, "-m", "shortstack", *words, "--quiet"], check=True)


def export(source: Path, spec: ExportSpec, out: Path) -> float:
    """Seconds that one export took. It is moved into its place when it is whole."""
    began = time.perf_counter()
    scratch = out.with_name(f".{out.name}")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir()
    artifact = exporter(spec.format).export(Checkpoint.open(source), spec, scratch)
    if spec.format == "gguf":
        artifact.path.rename(out)
        for left in scratch.iterdir():
            left.unlink()
        scratch.rmdir()
    else:
        scratch.rename(out)
    return time.perf_counter() - began


def exports_of(asked: argparse.Namespace, layers: int, fmt: str) -> None:
    """Every export of one depth and format that is missing, in turn, in a process of its own."""
    source = checkpoint(asked.models, layers)
    todo: list[tuple[ExportSpec, Path]] = []
    if fmt == "gguf":
        todo = [(ExportSpec("gguf", p), gguf(asked.big, layers, p)) for p in GGUF]
    else:
        todo = [
            (ExportSpec("onnx", p, tuple(options.items())), onnx(asked.models, layers, p))
            for p, options in ONNX.items()
        ]
    for spec, out in todo:
        if not out.exists():
            seconds = export(source, spec, out)
            print(f"{out.name}: {seconds:.0f} s", flush=True)


def make(asked: argparse.Namespace) -> None:
    asked.big.mkdir(parents=True, exist_ok=True)
    deepest, *others = sorted(asked.layers, reverse=True)
    whole = checkpoint(asked.models, deepest)
    if not (whole / "config.json").is_file():
        make_synthetic(whole, asked.shape, num_hidden_layers=deepest)
    with ProcessPoolExecutor(asked.jobs, mp_context=get_context("spawn")) as pool:
        first = [pool.submit(exports_of, asked, deepest, f) for f in asked.formats]
        cuts = {
            n: pool.submit(cut, whole, n, checkpoint(asked.models, n))
            for n in others
            if not checkpoint(asked.models, n).exists()
        }
        for done in cuts.values():
            done.result()
        # the half first: it is what the whole is held against
        order = sorted(others, key=lambda n: abs(n - deepest / 2))
        rest = [pool.submit(exports_of, asked, n, f) for n in order for f in asked.formats]
        for exported in (*first, *rest):
            exported.result()


@dataclass(frozen=True)
class Campaign:
    """One call of `shortstack bench`: what stands side by side is measured in turn."""

    name: str
    models: tuple[Path, ...]
    options: tuple[str, ...] = ()
    batch: int = 1
    energy: bool = False

    def words(self, asked: argparse.Namespace) -> list[str]:
        return [
            *("bench", *map(str, self.models), "-o", str(asked.out / self.name), "--quiet"),
            *(
                "--device",
                asked.device,
                "--batch",
                str(self.batch),
                "--threads",
                str(asked.threads),
            ),
            *("--prompt-tokens", str(asked.prompt_tokens)),
            *("--decode-tokens", str(asked.decode_tokens)),
            *("--repeats", "1" if self.energy else str(asked.repeats), "--timeout", "240"),
            *("--memory-repeats", "0" if self.energy else "1"),
            *(word for option in self.options for word in ("--option", option)),
            *(("--energy",) if self.energy else ()),
            *(() if self.runtime is None else ("--runtime", self.runtime)),
        ]

    @property
    def runtime(self) -> str | None:
        """One runtime a format is enough here: genai runs the same graphs."""
        if self.name.startswith("gguf"):
            return None
        return "onnxruntime" if self.name.startswith("onnx") else "pytorch"


STAGES = (
    (0, 1, False),
    (0, 8, False),
    (1, 1, False),
    (0, 1, True),
    (1, 8, False),
    (0, 8, True),
)
"""Pair of depths, batch, whether for energy: the most wanted first."""


def campaigns(asked: argparse.Namespace) -> list[Campaign]:
    """Those of the lane, the most wanted first; or those that were named, in that order.

    Raises SystemExit for a name that is none.
    """
    lanes = LANES if asked.lane is None else (asked.lane,)
    made = [campaign for lane in lanes for campaign in of_lane(asked, lane)]
    if asked.only is None:
        return made
    named = {campaign.name: campaign for campaign in made}
    for name in asked.only:
        if name not in named:
            raise SystemExit(f"no campaign {name}. There are: {', '.join(named)}")
    return [named[name] for name in asked.only]


def of_lane(asked: argparse.Namespace, lane: str) -> Iterator[Campaign]:
    """The whole against its half first, then the depths between and below."""
    pairs = [tuple(asked.layers[at : at + 2]) for at in range(0, len(asked.layers), 2)]
    for place, batch, energy in STAGES:
        if place >= len(pairs):
            continue
        depths = "-".join(map(str, pairs[place]))
        every = place == 0 and batch == 1
        for name, models, options in kinds(asked, lane, pairs[place], every=every):
            told = f"{name}-{depths}-b{batch}" + ("-energy" if energy else "")
            yield Campaign(told, models, options, batch, energy)


def kinds(
    asked: argparse.Namespace, lane: str, pair: tuple[int, ...], *, every: bool
) -> Iterator[tuple[str, tuple[Path, ...], tuple[str, ...]]]:
    """(name, models, options) of what one lane runs at these depths."""
    if lane == "gguf":
        yield "gguf", tuple(gguf(asked.big, n, p) for p in GGUF for n in pair), ()
    elif lane == "onnx":
        yield "onnx", tuple(onnx(asked.models, n, p) for p in ONNX for n in pair), ()
    else:
        models = tuple(checkpoint(asked.models, n) for n in pair)
        yield "graph", models, ("dtype=float16", "cuda_graph=on")
        for weights in WEIGHTS if every else ():
            dtype = "bfloat16" if weights == "torchao-int4" else "float16"
            options = (f"dtype={dtype}", f"quantize={weights}")
            yield weights, models, options
            if weights not in WITHOUT_GRAPH:
                yield f"{weights}-graph", models, (*options, "cuda_graph=on")
        yield "eager", models, ("dtype=float16",)


def bench(asked: argparse.Namespace, wanted: Sequence[Campaign]) -> None:
    """Run in turn what is missing, or what a case failed in."""
    asked.out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * asked.minutes
    for campaign in wanted:
        done = asked.out / campaign.name / "bench.json"
        if whole(done) or time.monotonic() > ends:
            continue
        began = time.monotonic()
        words = [sys.executable, "-m", "shortstack", *campaign.words(asked)]
        code = subprocess.run(words).returncode  # it prints its own table
        print(f"{campaign.name}: exit {code}, {time.monotonic() - began:.0f} s", flush=True)


def whole(file: Path) -> bool:
    """Whether a campaign ended and no case failed; `shortstack bench` tries those again."""
    if not file.is_file():
        return False
    record = json.loads(file.read_text(encoding="utf-8"))
    return all(one["failure"] is None for one in record["measurements"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", choices=("make", "bench"))
    parser.add_argument("models", type=Path)
    parser.add_argument("--big", type=Path, required=True, help="where the GGUF files lie")
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--layers", nargs="+", type=int, default=[32, 16, 24, 12])
    parser.add_argument("--formats", nargs="+", choices=("gguf", "onnx"), default=["gguf", "onnx"])
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lane", choices=LANES)
    parser.add_argument("--only", nargs="+", metavar="CAMPAIGN", help="these, in this order")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--decode-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60.0)
    asked = parser.parse_args()
    if asked.work == "make":
        make(asked)
    elif asked.out is None or (asked.lane is None and asked.only is None):
        parser.error("bench wants --out, and --lane or --only")
    else:
        bench(asked, campaigns(asked))


if __name__ == "__main__":
    main()
