"""The report in words and tables, once; HTML and Markdown both show these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shortstack.devices.measurement import Measurement
from shortstack.devices.report.charts import number
from shortstack.devices.report.compare import Comparison, peak_bytes
from shortstack.devices.report.data import ORIGINAL, PRUNED, Entry
from shortstack.devices.stats import Interval, drift, median, median_interval, spread
from shortstack.recipe import QUANTIZED

NONE = "\N{EN DASH}"
NOT_TIMED = "not timed"
"""What stands for the speed of a record without trials and without a failure."""
TIMES = "\N{MULTIPLICATION SIGN}"
FORMATS = {"gguf": "GGUF", "onnx": "ONNX", "checkpoint": "PyTorch"}


@dataclass(frozen=True)
class Table:
    """Cells are text; the first `text_columns` are left-aligned names, the rest are numbers."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 3


def spec_name(entry: Entry) -> str:
    """`GGUF Q8_0`, `GGUF Q4_0, head q6_k`; the slug where there is no artifact."""
    if entry.artifact is None:
        return entry.spec
    spec = entry.artifact["spec"]
    options = [f"{key} {value}" for key, value in spec.get("options", {}).items()]
    name = f"{FORMATS.get(spec['format'], spec['format'])} {spec['precision']}"
    quantized = ["quantized"] if entry.spec.endswith(QUANTIZED) else []
    return ", ".join([name, *options, *quantized])


def compared_name(comparison: Comparison, names: Mapping[str, str]) -> str:
    """The export; where it is not the pruned model's, of which exit."""
    name = names.get(comparison.spec, comparison.spec)
    return name if comparison.label == PRUNED else f"{name}, {comparison.label}"


def other_word(labels: Iterable[str]) -> str:
    """What the original is held against, in one word or two."""
    seen = set(labels) - {ORIGINAL}
    words = ["pruned"] * (PRUNED in seen or not seen) + ["exit"] * bool(seen - {PRUNED})
    return " or ".join(words)


def megabytes(value: float | None) -> str:
    return NONE if value is None else number(value / 1e6)


def factor(value: Interval | float | None) -> str:
    """`1.21 × (1.18 to 1.23)`, or `1.21 ×`."""
    if value is None:
        return NONE
    if isinstance(value, Interval):
        return f"{value.estimate:.2f} {TIMES} ({value.low:.2f} to {value.high:.2f})"
    return f"{value:.2f} {TIMES}"


def percent(value: Interval | float | None, digits: int = 0) -> str:
    if value is None:
        return NONE
    share = value.estimate if isinstance(value, Interval) else value
    return f"{100 * share:.{digits}f} %"


def with_interval(values: Sequence[float]) -> str:
    """Median and the interval of the median; the median alone below two values."""
    if not values:
        return NONE
    if len(values) < 2:
        return number(values[0])
    found = median_interval(values)
    return f"{number(found.estimate)} ({number(found.low)} to {number(found.high)})"


def speed_table(entries: Sequence[Entry]) -> Table:
    rows = []
    for entry in entries:
        m = entry.measurement
        if m is None or not m.trials:
            continue
        steps = [step for trial in m.decode_step_s for step in trial]
        rows.append(
            (
                *_names(entry),
                with_interval(m.decode_tokens_per_s),
                number(1e3 * median(steps)),
                with_interval(m.prefill_tokens_per_s),
                number(1e3 * median(m.ttft_s)),
                number(1e3 * median(m.load_s)),
            )
        )
    columns = (
        *("Export", "Runtime", "Model", "Decode, tokens/s", "Decode step, ms"),
        *("Prefill, tokens/s", "First token, ms", "Load, ms"),
    )
    caption = "Speed: medians over trials, in brackets the 95 % interval of the median"
    return Table(caption, columns, tuple(rows))


def size_table(entries: Sequence[Entry]) -> Table:
    rows = []
    for entry in entries:
        artifact, m = entry.artifact, entry.measurement
        if artifact is None:
            continue
        rows.append(
            (
                *_names(entry),
                str(artifact["n_layers"]),
                number(artifact["n_params"] / 1e6),
                megabytes(artifact["size_bytes"]),
                megabytes(artifact["weight_bytes_per_token"]),
                megabytes(_memory(m, "peak_anon_bytes")),
                megabytes(_memory(m, "peak_file_bytes")),
                megabytes(peak_bytes(m)),
            )
        )
    columns = (
        *("Export", "Runtime", "Model", "Layers", "Parameters, M", "Size, MB"),
        *("Read a token, MB", "Peak anonymous, MB", "Peak file-backed, MB", "Peak total, MB"),
    )
    return Table("Size and memory", columns, tuple(rows))


def comparison_table(comparisons: Sequence[Comparison], names: Mapping[str, str]) -> Table:
    rows = tuple(
        (
            compared_name(c, names),
            c.runtime,
            factor(c.decode_speedup) if c.reason is None else c.reason,
            factor(c.bytes_ratio),
            percent(c.gain_over_bytes),
            factor(c.prefill_speedup),
            factor(c.size_ratio),
            factor(c.peak_ratio),
        )
        for c in comparisons
    )
    columns = (
        *(
            "Export",
            "Runtime",
            "Decode speed-up",
            "Bytes read a token",
            "Speed-up over bytes saved",
        ),
        *("Prefill speed-up", "File size", "Peak memory"),
    )
    other = other_word(c.label for c in comparisons)
    caption = f"Original over {other}: above 1 the {other} model is faster or smaller"
    return Table(caption, columns, rows, 2)


def verification_table(entries: Sequence[Entry]) -> Table:
    rows = []
    for entry in entries:
        found = entry.verification
        if found is None:
            continue
        bounds = entry.bounds or {}
        rows.append(
            (
                *_names(entry),
                _bounded(found, bounds, "mean_kl_prefill"),
                _bounded(found, bounds, "mean_kl_decode"),
                _bounded(found, bounds, "top1_agreement", share=True),
                _figure(found, "perplexity"),
                _figure(found, "reference_perplexity"),
                _bounded(found, bounds, "perplexity_ratio"),
                _figure(found, "n_tokens"),
                _equal(found.get("tokenizer_equal")),
            )
        )
    columns = (
        *("Export", "Runtime", "Model", "Mean KL, prefill, nat", "Mean KL, decode, nat"),
        *("Same top token", "Perplexity", "In PyTorch", "Ratio", "Tokens", "Tokenizer"),
    )
    caption = "Each file opened in its runtime and compared with its own PyTorch model"
    return Table(caption, columns, tuple(rows))


def conditions_table(entries: Sequence[Entry]) -> Table:
    rows = []
    for entry in entries:
        m = entry.measurement
        if m is None or not m.trials:
            continue
        rates = m.decode_tokens_per_s
        foreign = [t.conditions.get("foreign_cpu_share") for t in m.trials]
        loads = [(t.conditions.get("before") or {}).get("load_average_1min") for t in m.trials]
        rows.append(
            (
                *_names(entry),
                str(m.runtime_info.get("threads", NONE)),
                str(len(m.trials)),
                percent(spread(rates), 1) if len(rates) > 1 else NONE,
                NONE if (change := drift(rates)) is None else f"{100 * change:+.1f} %",
                _largest(foreign, percent),
                _largest(loads, number),
            )
        )
    columns = (
        *("Export", "Runtime", "Model", "Threads in force", "Timed trials"),
        *("Spread of decode speed", "Drift, last half over first"),
        *("CPU taken by others, at most", "Load average, at most"),
    )
    return Table("Conditions during the timed trials", columns, tuple(rows))


def _names(entry: Entry) -> tuple[str, str, str]:
    return spec_name(entry), entry.runtime, entry.label


def _memory(measurement: Measurement | None, key: str) -> float | None:
    values = [getattr(m, key) for m in measurement.memory] if measurement else []
    return median(values) if values and None not in values else None


def _figure(found: Mapping[str, Any], key: str) -> str:
    return NONE if found.get(key) is None else number(found[key])


def _bounded(
    found: Mapping[str, Any], bounds: Mapping[str, Any], key: str, *, share: bool = False
) -> str:
    """A figure and the limit it was held to."""
    if found.get(key) is None:
        return NONE

    def say(value: float) -> str:
        return percent(value, 1) if share else number(value)

    limit = bounds.get(key)
    sign = "\N{GREATER-THAN OR EQUAL TO}" if share else "\N{LESS-THAN OR EQUAL TO}"
    words = say(found[key])
    return words if limit is None else f"{words} ({sign} {say(limit)})"


def _equal(same: bool | None) -> str:
    """A runtime that has no tokenizer of its own has nothing to compare."""
    if same is None:
        return NONE
    return "same" if same else "differs"


def _largest(values: Sequence[float | None], say: Any) -> str:
    known = [value for value in values if value is not None]
    return str(say(max(known))) if known else NONE
