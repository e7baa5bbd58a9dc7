"""What each exit of a model takes against the share of layers that it runs, in every runtime.

    python -m benchmarks.exit_speed make MODEL --work WORK [--exits EXITS] [--device cuda:0]
    python -m benchmarks.exit_speed bench MODEL --work WORK --out OUT [--device cuda:0]
        [--threads N] [--runtimes pytorch pytorch-graph llama.cpp onnxruntime]
    python -m benchmarks.exit_speed table OUT...

`make` writes every exit of --at as an ordinary folder (as `shortstack exits export` does) and
exports those and the model as GGUF Q8_0 and as ONNX, fp32 for the CPU and fp16 for a card. Without
--exits they are made of copies of the last layer, not trained: speed does not depend on the values
of weights. For the same reason no export is certified, which their records say. `bench` makes what
is missing, then runs one campaign of `shortstack bench` a runtime, all depths in turn in fresh
processes: `pytorch` on the folder of exits (`EXITS@8`), `pytorch-graph` (cards alone) on the
written folders with a CUDA graph. On a card PyTorch computes in float16, on the CPU in float32.

The table, from records alone: a ratio is the median over rounds of a depth's time over the whole
model's in the same round, with a bootstrap interval; (k+1)/L the layers it runs over the model's.
`bytes` is what a model of bytes says of a step: weights that it reads, and the cache in the middle
of decoding; `operations` what one of operations says of a prefill (both of docs/roofline.md). They
know the head, which is as large at every depth, and nothing else that does not depend on depth.
The whole model is known by its name and hashes, not by its depth: an exit behind all layers but one
runs as many.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.formats import Campaign, bench, export
from benchmarks.formats_table import cases, form

from shortstack.artifact import ExportSpec
from shortstack.checkpoint import Checkpoint
from shortstack.devices.host import usable_cores
from shortstack.devices.record_fields import TrialRecord
from shortstack.devices.records import load_records
from shortstack.devices.report.merged.cases import Case
from shortstack.devices.roofline.share import prefill_flops, step_bytes
from shortstack.devices.stats import median, paired_ratio_interval
from shortstack.errors import ShortstackError
from shortstack.exits.folder import ExitFolder, read_exits, write_exits
from shortstack.export import exporter
from shortstack.runtimes.capabilities import device_kind

NAMES = {
    "pytorch": "pytorch-exits",
    "pytorch-graph": "graph-exits",
    "llama.cpp": "gguf-exits",
    "onnxruntime": "onnx-exits",
}
"""Runtime -> campaign; `formats.Campaign` reads the runtime from its name."""
EXIT_NAME = re.compile(r"at-\d+([-.].*)?")
"""What `folder` and `exported` call exits."""
HEAD = """\
| | layers run | (k+1)/L | a step, ms | over the whole (95 %) | ÷ (k+1)/L | bytes predict \
| prompt, ms | over the whole (95 %) | ÷ (k+1)/L | operations predict |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"""


def untrained(base: Checkpoint, at: Sequence[int], out: Path) -> ExitFolder:
    """Exits as training would begin with them, in the type of the model's layers."""
    import torch

    from shortstack.pretrained import load
    from shortstack.prune.exits.start import starting_tensors
    from shortstack.prune.heal.train import STORED

    start = starting_tensors(load(base.path, torch.float32), base, at, "last", 0)
    last = base.family.layer_name(base.n_layers - 1, base.family.layer[0])
    dtype = STORED[base.tensors[last].dtype]
    tensors = {
        f"exits.{exit}.{name}": tensor.to(dtype)
        for exit, given in start.items()
        for name, tensor in given.items()
    }
    scratch = out.with_name(f".{out.name}.partial")
    scratch.mkdir(parents=True, exist_ok=True)
    facts = {"tokens": 0, "note": "not trained: for speed alone"}
    write_exits(scratch, base, at, "last", tensors, facts, lies_at=out)
    scratch.rename(out)
    return read_exits(out, base.path)


def exits_of(asked: argparse.Namespace) -> ExitFolder:
    """Those that were named, or made before, or untrained ones. Raises ShortstackError for those of
    another model, whose exports lie in WORK, too."""
    made = asked.exits or asked.work / "exits"
    if asked.exits is None and not made.exists():
        print("exits are copies of the last layer, not trained: for speed alone", flush=True)
        return untrained(Checkpoint.open(asked.model), asked.at, made)
    exits = read_exits(made, asked.model)
    exits.open_base()
    return exits


def folder(asked: argparse.Namespace, depth: int | None) -> Path:
    """An exit as an ordinary model; None: the model itself."""
    return Path(asked.model) if depth is None else Path(asked.work) / f"at-{depth}"


def exported(asked: argparse.Namespace, depth: int | None, spec: ExportSpec) -> Path:
    name = f"{'whole' if depth is None else f'at-{depth}'}-{spec.precision}"
    return Path(asked.work) / (f"{name}.gguf" if spec.format == "gguf" else name)


def specs(asked: argparse.Namespace) -> dict[str, ExportSpec]:
    """By the runtime that opens it."""
    kind, _ = device_kind(asked.device)
    return {
        "llama.cpp": ExportSpec("gguf", "Q8_0"),
        "onnxruntime": ExportSpec("onnx", "fp32" if kind == "cpu" else "fp16"),
    }


def make(asked: argparse.Namespace) -> None:
    """Write what is missing. A format that cannot be written here is left out and said."""
    from shortstack.prune.exits.cut import write_exit

    asked.work.mkdir(parents=True, exist_ok=True)
    exits = exits_of(asked)
    for depth in asked.at:
        out = folder(asked, depth)
        if not out.exists():
            scratch = out.with_name(f".{out.name}.partial")
            scratch.mkdir(exist_ok=True)
            write_exit(exits.open_base(), exits, depth, scratch)
            scratch.rename(out)
    for runtime, spec in specs(asked).items():
        if runtime not in asked.runtimes:
            continue
        try:
            exporter(spec.format).check(Checkpoint.open(asked.model), spec)
            for depth in (*asked.at, None):
                out = exported(asked, depth, spec)
                if not out.exists():
                    print(
                        f"{out.name}: {export(folder(asked, depth), spec, out):.0f} s", flush=True
                    )
        except ShortstackError as error:
            print(f"{runtime} is left out: {error}", flush=True)


def campaigns(asked: argparse.Namespace) -> list[Campaign]:
    """One a runtime, of what was made; graphs where there is a card."""
    depths = (*asked.at, None)
    exits = exits_of(asked)
    on_card = device_kind(asked.device)[0] != "cpu"
    dtype = ("dtype=float16",) if on_card else ()
    found = []
    for runtime in asked.runtimes:
        if runtime == "pytorch":
            at = (*asked.at, exits.n_layers)
            models = tuple(exits.path.with_name(f"{exits.path.name}@{depth}") for depth in at)
            found.append(Campaign(NAMES[runtime], models, dtype))
        elif runtime == "pytorch-graph":
            if on_card:
                models = tuple(folder(asked, depth) for depth in depths)
                found.append(Campaign(NAMES[runtime], models, (*dtype, "cuda_graph=on")))
        else:
            models = tuple(exported(asked, depth, specs(asked)[runtime]) for depth in depths)
            if all(model.exists() for model in models):
                found.append(Campaign(NAMES[runtime], models))
    return found


def ratio(one: Case, whole: Case, time: Callable[[TrialRecord], float]) -> tuple[float, str]:
    """(estimate, in words) over the rounds that both have."""
    above, below = (
        {trial.round: time(trial) for trial in case.measurement.trials} for case in (one, whole)
    )
    if one is whole:
        return 1.0, "1"
    rounds = sorted(above.keys() & below.keys())
    found = paired_ratio_interval([above[n] for n in rounds], [below[n] for n in rounds])
    return found.estimate, f"{found.estimate:.3f} ({found.low:.3f} to {found.high:.3f})"


def step_s(trial: TrialRecord) -> float:
    return sum(trial.decode_step_s) / len(trial.decode_step_s)


def prefill_s(trial: TrialRecord) -> float:
    return trial.prefill_s


def line(case: Case, whole: Case) -> str:
    layers = case.n_layers / whole.n_layers
    mine, other = (one.measurement.model_dump(by_alias=True) for one in (case, whole))
    cells = [form(case), f"{case.n_layers} of {whole.n_layers}", f"{layers:.3f}"]
    for time, predict in ((step_s, step_bytes), (prefill_s, prefill_flops)):
        milliseconds = 1e3 * median([time(trial) for trial in case.measurement.trials])
        estimate, words = ratio(case, whole, time)
        work = predict(mine), predict(other)
        cells += [f"{milliseconds:.2f}", words]
        cells.append(f"{estimate / layers:.2f}")
        cells.append(f"{work[0] / work[1]:.3f}" if work[0] and work[1] else "-")
    return f"| {' | '.join(cells)} |"


def table(outs: Sequence[Path]) -> list[str]:
    """Rows by form, the whole model first; what failed, what was held against nothing as the whole
    model was not measured, and flags, below."""
    told, notes = [HEAD], []
    flags: dict[str, dict[str, None]] = defaultdict(dict)
    for every in campaigns_of(outs):
        done = [case for case in every if why_not(case) is None]
        if not is_whole(every[0]):
            depths = ", ".join(str(case.n_layers) for case in every)
            notes.append(
                f"{form(every[0])}: only exits were measured (layers: {depths}), the whole model "
                "was not. There is nothing to hold them against: bench both in one campaign."
            )
        elif every[0] in done:
            told += [line(case, every[0]) for case in done]
        for case in every:
            name = f"{form(case)}, {case.n_layers} layers"
            notes += [] if case in done else [f"{name} failed: {why_not(case)}"]
            for flag in case.measurement.flags:
                flags[flag.partition(":")[0]][name] = None
    notes += [f"`{flag}`: {'; '.join(carriers)}" for flag, carriers in flags.items()]
    return [*told, *(f"\n{note}" for note in notes)]


def campaigns_of(outs: Sequence[Path]) -> list[list[Case]]:
    """What ran in turn in one form, the whole model first; in the order of NAMES."""
    found: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for record, case in cases(load_records(outs)):
        found[record.run_id, form(case)].append(case)
    order = list(NAMES)
    return sorted(
        (
            sorted(every, key=lambda case: (not is_whole(case), -case.n_layers))
            for every in found.values()
        ),
        key=lambda every: (order.index(every[0].runtime), form(every[0])),
    )


def is_whole(case: Case) -> bool:
    """Whether it is the model that the others are exits of: `EXITS@30` that is its own source, or
    what has no name of an exit's."""
    artifact = case.measurement.artifact
    name = Path(artifact.path).name
    if "@" in name:
        return artifact.sha256 == artifact.source_sha256
    return EXIT_NAME.fullmatch(name) is None


def why_not(case: Case) -> str | None:
    """Why there is nothing to compare; None if there is."""
    if case.measurement.failure is not None:
        return case.measurement.failure.message
    return None if case.measurement.trials else "it has no trials"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    works = parser.add_subparsers(dest="task", required=True)
    for name in ("make", "bench"):
        one = works.add_parser(name)
        one.add_argument("model", type=Path)
        one.add_argument("--work", type=Path, required=True, help="where folders and exports lie")
        one.add_argument("--exits", type=Path, help="trained ones; without, untrained are made")
        one.add_argument("--at", type=int, nargs="+", default=[8, 15, 22])
        one.add_argument("--device", default="cpu")
        one.add_argument("--runtimes", nargs="+", choices=tuple(NAMES), default=list(NAMES))
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--threads", type=int, default=usable_cores())
    one.add_argument("--prompt-tokens", type=int, default=128)
    one.add_argument("--decode-tokens", type=int, default=64)
    one.add_argument("--repeats", type=int, default=4)
    one.add_argument("--minutes", type=float, default=60.0, help="after which no campaign begins")
    works.add_parser("table").add_argument("out", type=Path, nargs="+")
    return parser


def main() -> None:
    asked = arguments().parse_args()
    if asked.task == "table":
        print("\n".join(table(asked.out)))
        return
    make(asked)
    if asked.task == "bench":
        bench(asked, campaigns(asked))
        print("\n".join(table([asked.out])))


if __name__ == "__main__":
    main()
