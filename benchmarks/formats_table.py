"""The table of docs/cards.md from the records of `benchmarks.formats bench`.

    python -m benchmarks.formats_table OUT [--batch 1]

A row is one form of the weights at one depth. Times and shares are medians over trials; energy is
net of idle, per token, from campaigns named `-energy`. The last two columns hold a row against the
deepest model of its own form, and against the deepest PyTorch model in float16 with a CUDA graph;
both sides of the first ran in turn in one campaign, those of the second in one sitting on one card.
Flags of the records are printed below the table, each with the rows that carry it.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shortstack.devices.records import Record, load_records
from shortstack.devices.report.merged.cases import Case
from shortstack.devices.report.merged.machines import Place
from shortstack.devices.stats import median
from shortstack.roofline_report import shares

NAMES = {"llama.cpp": "GGUF", "onnxruntime": "ONNX", "pytorch": "PyTorch"}
BEST_KNOWN = "PyTorch float16, CUDA graph"
HEAD = """\
| | layers | a step, ms | tokens/s | of the roofline | prompt, tokens/s | of the roofline \
| card, GB | J a token | over the deepest of its form | over float16 with a graph |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"""
Key = tuple[str, int, int]
"""Form of the weights, layers, batch."""


@dataclass(frozen=True)
class Row:
    case: Case
    decode_share: float | None
    prefill_share: float | None

    @property
    def step_ms(self) -> float:
        return median(self.case.decode_ms)


def form(case: Case) -> str:
    """What people call it: `GGUF Q4_0`, `PyTorch bnb-nf4`."""
    options = dict(case.shape.options)
    kind = case.measurement.artifact.spec.precision
    if case.runtime == "pytorch":
        kind = options.get("quantize", options.get("dtype", "float32"))
    graph = ", CUDA graph" if options.get("cuda_graph") == "on" else ""
    return f"{NAMES.get(case.runtime, case.runtime)} {kind}{graph}"


def cases(records: Sequence[Record]) -> Iterator[tuple[Record, Case]]:
    for number, record in enumerate(records, 1):
        for measurement in record.measurements:
            place = Place("", measurement.device, "", None)  # of one machine: no names
            yield record, Case(record, measurement, place, number)


def collect(records: Sequence[Record]) -> tuple[dict[Key, Row], dict[Key, float]]:
    """Rows, and net joules a token of decoding. The run with more trials tells the times."""
    rows: dict[Key, Row] = {}
    joules: dict[Key, float] = {}
    for record, case in cases(records):
        key = form(case), case.n_layers, case.shape.batch
        for entry in case.measurement.energy:
            if entry.phase == "decode" and entry.net_j is not None:
                joules[key] = entry.net_j / entry.tokens
        if case.measurement.failure is not None or not case.measurement.trials:
            continue
        known = rows.get(key)
        if known is None or len(known.case.measurement.trials) < len(case.measurement.trials):
            told = case.measurement.model_dump(by_alias=True)
            both = shares(told, record.ceilings)
            decode, prefill = (one.share.estimate if one.share else None for one in both)
            rows[key] = Row(case, decode, prefill)
    return rows, joules


def line(key: Key, row: Row, rows: dict[Key, Row], joules: dict[Key, float]) -> str:
    name, layers, batch = key
    deepest = max(n for form, n, b in rows if (form, b) == (name, batch))
    whole = rows[name, deepest, batch].step_ms
    known = [n for form, n, b in rows if (form, b) == (BEST_KNOWN, batch)]
    best = rows[BEST_KNOWN, max(known), batch].step_ms if known else None
    memory = row.case.peak_bytes
    cells = [
        *(name, str(layers), f"{row.step_ms:.2f}"),
        f"{median(row.case.decode_tokens_per_s):,.0f}",
        share(row.decode_share),
        f"{median(row.case.prefill_tokens_per_s):,.0f}",
        share(row.prefill_share),
        "-" if memory is None else f"{memory / 1e9:.1f}",
        f"{joules[key]:.3f}" if key in joules else "-",
        f"{whole / row.step_ms:.2f}",
        "-" if best is None else f"{best / row.step_ms:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, nargs="+")
    parser.add_argument("--batch", type=int, default=1)
    asked = parser.parse_args()
    rows, joules = collect(load_records(asked.out))
    wanted = sorted((k for k in rows if k[2] == asked.batch), key=lambda key: (key[0], -key[1]))
    print(HEAD)
    flags: dict[str, list[str]] = defaultdict(list)
    for key in wanted:
        print(line(key, rows[key], rows, joules))
        for flag in rows[key].case.measurement.flags:
            flags[flag.partition(":")[0]].append(f"{key[0]} {key[1]}")
    for flag, carriers in flags.items():
        print(f"\n`{flag}`: {', '.join(carriers)}")


if __name__ == "__main__":
    main()
