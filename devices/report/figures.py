"""Which chart shows what. Every figure's numbers are also in a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from shortstack.devices.report.charts import Bar, Group, bar_chart, number
from shortstack.devices.report.compare import Comparison
from shortstack.devices.report.data import Entry, ReportData
from shortstack.devices.report.layers import is_wide, layer_chart
from shortstack.devices.report.view import (
    TIMES,
    compared_name,
    factor,
    megabytes,
    other_word,
    percent,
    spec_name,
)
from shortstack.devices.stats import median, median_interval


@dataclass(frozen=True)
class Figure:
    """One chart, what it says in a sentence, and its colours: (class, words)."""

    title: str
    note: str
    image: Markup
    legend: tuple[tuple[str, str], ...] = ()


def pair(entries: Sequence[Entry]) -> tuple[tuple[str, str], ...]:
    """The legend: the original, and what is less deep."""
    return (("original", "original"), ("pruned", other_word(e.label for e in entries)))


def figures(data: ReportData, comparisons: Sequence[Comparison]) -> list[Figure]:
    """Every figure that the data can fill."""
    made = [
        decode_speed(data.entries),
        gain_over_bytes(comparisons, {e.spec: spec_name(e) for e in data.entries}),
        memory(data.entries),
        size(data.entries),
        perplexity(data),
    ]
    return [figure for figure in made if figure is not None]


def decode_speed(entries: Sequence[Entry]) -> Figure | None:
    def bar(entry: Entry) -> Bar | None:
        if entry.measurement is None or not entry.measurement.trials:
            return None
        rates = entry.measurement.decode_tokens_per_s
        found = median_interval(rates)
        known = len(rates) > 1
        return Bar(
            entry.label,
            ((found.estimate, _kind(entry)),),
            number(found.estimate),
            found.low if known else None,
            found.high if known else None,
        )

    note = "Tokens a second after the first token, batch 1. Whiskers: 95 % interval of the median."
    return _grouped("Decode speed", note, entries, bar, "tokens/s", pair(entries))


def gain_over_bytes(comparisons: Sequence[Comparison], names: Mapping[str, str]) -> Figure | None:
    groups = []
    for c in comparisons:
        if c.decode_speedup is None or c.bytes_ratio is None:
            continue
        speed = c.decode_speedup
        groups.append(
            Group(
                f"{compared_name(c, names)} \N{MIDDLE DOT} {c.runtime}",
                (
                    Bar(
                        "gain",
                        ((speed.estimate, "pruned"),),
                        f"{speed.estimate:.2f} {TIMES}, {percent(c.gain_over_bytes)}",
                        speed.low,
                        speed.high,
                        c.bytes_ratio,
                    ),
                ),
            )
        )
    if not groups:
        return None
    note = (
        f"Decode speed-up of {other_word(c.label for c in comparisons)} over original; the line "
        "marks the ratio of weight bytes that a token reads, which is the speed-up to "
        "hope for. The share is speed-up over that ratio."
    )
    said = "; ".join(
        f"{compared_name(c, {})} in {c.runtime}: {factor(c.decode_speedup)} of "
        f"{factor(c.bytes_ratio)}"
        for c in comparisons
    )
    image = bar_chart("Speed-up against bytes saved", said, groups, TIMES)
    legend = (("pruned", "measured speed-up"), ("mark", "ratio of bytes read a token"))
    return Figure("Speed-up against bytes saved", note, image, legend)


def memory(entries: Sequence[Entry]) -> Figure | None:
    def bar(entry: Entry) -> Bar | None:
        trials = entry.measurement.memory if entry.measurement else ()
        anon = [m.at_peak.get("anon_bytes") for m in trials]
        file = [m.at_peak.get("file_bytes") for m in trials]
        anons, files = [a for a in anon if a is not None], [f for f in file if f is not None]
        if not anons or len(anons) != len(anon) or len(files) != len(file):
            return None
        low, high = median(anons) / 1e6, median(files) / 1e6
        kind = _kind(entry)
        return Bar(entry.label, ((low, kind), (high, f"{kind} file")), number(low + high))

    note = (
        "Resident at the moment of the largest total. Anonymous memory must stay in RAM; "
        "file-backed pages (mapped weights, libraries) can be dropped and read again."
    )
    other = other_word(e.label for e in entries)
    legend = (
        *(("original", "original, anonymous"), ("original file", "original, file-backed")),
        *(("pruned", f"{other}, anonymous"), ("pruned file", f"{other}, file-backed")),
    )
    return _grouped("Peak memory", note, entries, bar, "MB", legend)


def size(entries: Sequence[Entry]) -> Figure | None:
    def bar(entry: Entry) -> Bar | None:
        if entry.artifact is None:
            return None
        total = entry.artifact["size_bytes"]
        return Bar(entry.label, ((total / 1e6, _kind(entry)),), megabytes(total))

    once = {(e.spec, e.label): e for e in reversed(entries)}
    kept = [e for e in entries if once[e.spec, e.label] is e]
    return _grouped(
        "Size on disk", "All files of the artifact.", kept, bar, "MB", pair(kept), spec_name
    )


def perplexity(data: ReportData) -> Figure | None:
    groups = []
    if data.quality is not None:
        both = (
            ("original", data.quality.original_perplexity),
            ("pruned", data.quality.pruned_perplexity),
        )
        bars = tuple(Bar(kind, ((value, kind),), number(value)) for kind, value in both)
        groups.append(Group("PyTorch, not quantized", bars))

    def bar(entry: Entry) -> Bar | None:
        value = (entry.verification or {}).get("perplexity")
        return None if value is None else Bar(entry.label, ((value, _kind(entry)),), number(value))

    groups += _groups(data.entries, bar, _title)
    if not groups:
        return None
    note = "On text that no earlier step has seen. Lower is better; each file in its own runtime."
    image = bar_chart("Perplexity", _said(groups, ""), groups, "")
    return Figure("Perplexity", note, image, pair(data.entries))


def layer_scores(data: ReportData) -> Figure | None:
    plan = data.plan
    if not plan or not plan.get("scores"):
        return None
    # JSON writes a missing score as null, Python code as NaN.
    scores = [None if s is None or s != s else float(s) for s in plan["scores"]]
    dropped = list(plan["drop"])
    listed = ", ".join(map(str, dropped))
    wide = is_wide([s for s in scores if s is not None])
    note = (
        f"Score of each layer by the method \N{LEFT DOUBLE QUOTATION MARK}{plan['method']}"
        f"\N{RIGHT DOUBLE QUOTATION MARK}: higher means worth keeping"
        f"{' (logarithmic axis)' if wide else ''}. Dropped: {listed or 'none'}."
    )
    image = layer_chart("Layer scores", note, scores, dropped)
    legend = (("kept", "kept"), ("dropped", "dropped"))
    return Figure("Layer scores", note, image, legend)


def _grouped(
    title: str,
    note: str,
    entries: Sequence[Entry],
    bar: Callable[[Entry], Bar | None],
    unit: str,
    legend: tuple[tuple[str, str], ...],
    name: Callable[[Entry], str] | None = None,
) -> Figure | None:
    groups = _groups(entries, bar, name or _title)
    if not groups:
        return None
    return Figure(title, note, bar_chart(title, _said(groups, unit), groups, unit), legend)


def _groups(
    entries: Sequence[Entry], bar: Callable[[Entry], Bar | None], name: Callable[[Entry], str]
) -> list[Group]:
    found: dict[str, list[Bar]] = {}
    for entry in entries:
        made = bar(entry)
        if made is not None:
            found.setdefault(name(entry), []).append(made)
    return [Group(title, tuple(bars)) for title, bars in found.items()]


def _title(entry: Entry) -> str:
    return f"{spec_name(entry)} \N{MIDDLE DOT} {entry.runtime}"


def _kind(entry: Entry) -> str:
    return "original" if entry.label == "original" else "pruned"


def _said(groups: Sequence[Group], unit: str) -> str:
    """The chart in words, for those who do not see it."""
    return "; ".join(
        f"{group.title}: "
        + ", ".join(f"{bar.label} {bar.text} {unit}".strip() for bar in group.bars)
        for group in groups
    )
