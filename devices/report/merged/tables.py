"""The merged report's tables: cells are words, so that HTML and Markdown show the same."""

from __future__ import annotations

from collections.abc import Sequence

from shortstack.devices.report.charts import number
from shortstack.devices.report.merged.cases import Case
from shortstack.devices.report.merged.depth import DepthLine
from shortstack.devices.report.merged.front import Front, Point
from shortstack.devices.report.merged.gain import Gain
from shortstack.devices.report.merged.machines import Place
from shortstack.devices.report.merged.matrix import Row
from shortstack.devices.report.merged.merge import Merged, Projected
from shortstack.devices.report.merged.unlike import not_comparable
from shortstack.devices.report.view import (
    NONE,
    NOT_TIMED,
    Table,
    factor,
    megabytes,
    with_interval,
)
from shortstack.devices.stats import median

PROJECTED = "Projected, not measured"
"""How the caption of such a table begins; the page sets its rows apart by it."""


def side_by_side(rows: Sequence[Row], places: Sequence[Place]) -> Table:
    """Decode speed of each artifact at each place."""
    cells = tuple(
        (
            row.title,
            row.runtime,
            row.shape.words,
            *(row.cell(place) or NONE for place in places),
        )
        for row in rows
    )
    columns = ("Model", "Runtime", "Work", *(place.name for place in places))
    caption = "Decode, tokens/s, side by side: medians, in brackets the 95 % interval"
    return Table(caption, columns, cells)


def speed(merged: Merged) -> Table:
    """Every case on its own: nothing is compared here, so nothing is refused."""
    rows = tuple(
        (
            *_names(case),
            case.shape.words,
            str(case.run),
            str(case.measurement.runtime_info.get("threads", case.measurement.workload.threads)),
            with_interval(case.prefill_tokens_per_s),
            with_interval(case.ttft_ms),
            with_interval(case.decode_tokens_per_s),
            with_interval(case.decode_ms),
            _median(case.load_s("warm")),
            _median(case.load_s("cold")),
            str(len(case.measurement.trials)),
        )
        for case in merged.measured
    )
    columns = (
        *("Model", "Runtime", "Device", "Work", "Run", "Threads", "Prefill, tokens/s"),
        *("First token, ms", "Decode, tokens/s", "Decode step, ms"),
        *("Warm load, s", "Cold load, s", "Trials"),
    )
    caption = "Speed: medians over trials, in brackets the 95 % interval of the median"
    return Table(caption, columns, rows, 4)


def memory(merged: Merged) -> Table:
    rows = []
    for case in merged.cases:
        m = case.measurement
        if not m.memory:
            continue
        methods = dict.fromkeys(t.device_memory.method for t in m.memory if t.device_memory)
        kv = m.kv_bytes_per_token
        rows.append(
            (
                *_names(case),
                case.shape.words,
                megabytes(m.artifact.size_bytes),
                megabytes(case.peak_rss_bytes),
                megabytes(case.resident("peak_anon_bytes")),
                megabytes(case.resident("peak_file_bytes")),
                megabytes(case.device_memory("delta_bytes")),
                megabytes(case.device_memory("process_bytes")),
                megabytes(case.device_memory("allocator_peak_bytes")),
                NONE if kv is None else number(kv / 1e3),
                ", ".join([m.memory[0].method, *methods]),
            )
        )
    columns = (
        *("Model", "Runtime", "Device", "Work", "Size, MB", "Peak resident, MB"),
        *("Anonymous, MB", "File-backed, MB", "Device over idle, MB", "Process on device, MB"),
        *("Allocator, MB", "KV cache, kB a token", "Method"),
    )
    return Table("Memory: medians over memory trials", columns, tuple(rows), 4)


def energy(merged: Merged) -> Table:
    rows = tuple(
        (
            *_names(case),
            case.shape.words,
            e.phase,
            e.scope,
            number(e.gross_j / e.tokens),
            NONE if e.net_j is None else number(e.net_j / e.tokens),
            NONE if e.idle_w is None else number(e.idle_w),
            number(e.window_s),
            e.method,
        )
        for case in merged.cases
        for e in case.measurement.energy
    )
    columns = (
        *("Model", "Runtime", "Device", "Work", "Phase", "Scope", "Gross, J a token"),
        *("Over idle, J a token", "Idle, W", "Window, s", "Method"),
    )
    return Table("Energy", columns, rows, 6)


def gain(gains: Sequence[Gain]) -> Table:
    rows = tuple(
        (
            f"{g.case.title}, against {g.whole.label}, {g.whole.n_layers} layers",
            g.case.runtime,
            g.case.place.name,
            g.case.shape.words,
            not_comparable(list(g.reasons)) if g.reasons else factor(g.decode),
            factor(g.prefill),
            factor(g.bytes_ratio),
            factor(g.peak_ratio),
            NONE if g.reasons else "in turn" if g.paired else "apart",
        )
        for g in gains
    )
    columns = (
        *("Model", "Runtime", "Device", "Work", "Decode speed-up", "Prefill speed-up"),
        *("Bytes read a token", "Peak memory", "Measured"),
    )
    caption = "What fewer layers bring: above 1, the shallower model is faster or smaller"
    return Table(caption, columns, rows, 4)


def depth(lines: Sequence[DepthLine]) -> Table:
    rows = tuple(
        (
            line.name,
            line.shape.words,
            ", ".join(str(n) for n in dict.fromkeys(line.layers)),
            number(line.ms_per_layer),
            number(line.ms_fixed),
            "exact, two depths" if len(set(line.layers)) == 2 else "least squares",
            f"{line.left_out} under other conditions" if line.left_out else NONE,
        )
        for line in lines
    )
    columns = (
        *("Line", "Work", "Layers", "A layer, ms a token", "The rest, ms a token"),
        *("Line through", "Left out"),
    )
    return Table("Cost of depth: a straight line through each model's depths", columns, rows, 2)


def pareto(fronts: Sequence[Front], metric: str | None) -> Table:
    rows = tuple(
        (
            point.case.title,
            point.case.runtime,
            front.place.name,
            front.shape.words,
            _standing(point),
            number(point.decode_tokens_per_s),
            *([NONE if point.verdict is None else _value(point)] if metric else []),
            megabytes(point.peak_bytes),
        )
        for front in fronts
        for point in front.points
    )
    columns = (
        *("Model", "Runtime", "Device", "Work", "Standing", "Decode, tokens/s"),
        *([metric.capitalize()] if metric else []),
        "Peak memory, MB",
    )
    axes = f"decode speed, {metric} and peak memory" if metric else "decode speed and peak memory"
    return Table(f"Which artifacts no other beats in {axes}", columns, rows, 5)


def runs_this(merged: Merged) -> Table:
    """What each place did with each artifact."""
    rows = sorted(
        (
            case.title,
            case.runtime,
            case.place.name,
            case.shape.words,
            _fits(case),
            with_interval(case.decode_tokens_per_s),
            megabytes(case.peak_bytes),
            megabytes(case.place.memory_bytes),
        )
        for case in merged.cases
    )
    columns = (
        *("Model", "Runtime", "Device", "Work", "Runs"),
        *("Decode, tokens/s", "Needs, MB", "There is, MB"),
    )
    return Table("Which of the machines runs this, as measured", columns, tuple(rows), 5)


def projected(found: Sequence[Projected]) -> Table:
    """What devices that were not at hand are expected to do; never among what was measured."""
    rows = tuple(
        (
            p.artifact,
            p.runtime,
            p.device,
            p.work,
            "; ".join(f"{number(b / 1e9)} GB: {'yes' if ok else 'no'}" for b, ok in p.fits) or NONE,
            p.error,
            p.basis,
            "; ".join(p.notes) or NONE,
            _expected(p),
            megabytes(p.need_bytes),
        )
        for p in found
    )
    columns = (
        *("Model", "Runtime", "Device", "Work", "Would fit", "Error of the same model"),
        *("Projected from", "Notes", "Decode, tokens/s, projected", "Needs, MB, projected"),
    )
    return Table(f"{PROJECTED}: devices that were not at hand", columns, rows, 8)


def _expected(p: Projected) -> str:
    words = number(p.decode_tokens_per_s)
    if p.low_tokens_per_s is None or p.high_tokens_per_s is None:
        return words
    return f"{words} ({number(p.low_tokens_per_s)} to {number(p.high_tokens_per_s)})"


def _fits(case: Case) -> str:
    failure = case.measurement.failure
    if failure is not None:
        words = f"no: {failure.message}" if not case.measurement.trials else "in part"
        return f"{words} (during {failure.phase})"
    if not case.measurement.trials:
        return NOT_TIMED
    need, have = case.peak_bytes, case.place.memory_bytes
    if need is None or not have:
        return "yes"
    share = f"{100 * need / have:.0f} %" if need >= have / 100 else "under 1 %"
    return f"yes, in {share} of its memory"


def _names(case: Case) -> tuple[str, str, str]:
    return case.title, case.runtime, case.place.name


def _standing(point: Point) -> str:
    if point.left_out is not None:
        return f"not judged: {point.left_out}"
    if not point.beaten_by:
        return "on the front"
    more = len(point.beaten_by) - 1
    return f"beaten by {point.beaten_by[0]}" + (f" and {more} more" if more else "")


def _value(point: Point) -> str:
    verdict = point.verdict
    if verdict is None:
        return NONE
    if verdict.low is None or verdict.high is None:
        return number(verdict.value)
    return f"{number(verdict.value)} ({number(verdict.low)} to {number(verdict.high)})"


def _median(values: Sequence[float]) -> str:
    return number(median(values)) if values else NONE
