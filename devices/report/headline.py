"""The first lines: by how much the pruned model is worse, then what that buys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from shortstack.devices.report import depth
from shortstack.devices.report.charts import number
from shortstack.devices.report.compare import Comparison
from shortstack.devices.report.data import ReportData
from shortstack.devices.report.view import TIMES, compared_name, factor
from shortstack.devices.stats import Interval

SAME = 0.005
"""Perplexities closer than this share are called equal."""
NOISE = 1.5
"""An interval whose ends differ by more than this factor tells nothing."""
LISTED = 3
"""Up to so many exports are named one by one."""


def cut_words(data: ReportData) -> str:
    """`without 6 of its 30 layers`, or nothing if there is no plan."""
    plan = data.plan
    if not plan or not plan.get("drop"):
        return ""
    count, total = len(plan["drop"]), plan["n_layers"]
    return f"without {count} of its {total} layers"


def headline(data: ReportData) -> str:
    """One sentence on quality, and on depth that is a choice. Worse is said first and with its
    size."""
    said = [] if data.plan is None and (data.exits or data.early_exit) else [_cut(data)]
    return " ".join([*said, depth.headline(data)]).strip()


def _cut(data: ReportData) -> str:
    subject = " ".join(filter(None, (data.model.name, cut_words(data))))
    quality = data.quality
    if quality is None:
        return f"{subject}: how much worse it became was not measured."
    from_to = f"(from {number(quality.original_perplexity)} to {number(quality.pruned_perplexity)})"
    if quality.ratio > 1 + SAME:
        return (
            f"{subject} is worse: its perplexity on unseen text is "
            f"{quality.ratio:.2f} times the original\N{RIGHT SINGLE QUOTATION MARK}s {from_to}."
        )
    if quality.ratio < 1 - SAME:
        return (
            f"{subject} is not worse: its perplexity on unseen text is "
            f"{quality.ratio:.2f} times the original\N{RIGHT SINGLE QUOTATION MARK}s {from_to}."
        )
    return f"{subject} is as good: its perplexity on unseen text did not change {from_to}."


def gains(comparisons: Sequence[Comparison], names: Mapping[str, str]) -> str:
    """What the cut buys, over all exports; an interval across 1 is no gain."""
    parts = [
        _speed(comparisons, names),
        _smaller("files", [c.size_ratio for c in comparisons]),
        _smaller("peak memory", [c.peak_ratio for c in comparisons]),
    ]
    told = [part for part in parts if part]
    if not told:
        return "Nothing was measured, so no gain can be claimed."
    return f"In exchange: {'; '.join(told)}."


def _speed(comparisons: Sequence[Comparison], names: Mapping[str, str]) -> str:
    known = [(c, c.decode_speedup) for c in comparisons if c.decode_speedup is not None]
    if not known:
        return ""
    if len(known) > LISTED:
        words = _range([speed.estimate for _, speed in known], lambda v: f"{v:.2f}")
        unsure = sum(_unsure(speed) for _, speed in known)
        tail = f" (in {unsure} of {len(known)} within the error of no change)" if unsure else ""
        return f"decode speed is {words} {TIMES}{tail}"
    each = [f"{_said(speed)} as {compared_name(c, names)} in {c.runtime}" for c, speed in known]
    return f"decode speed is {', '.join(each)}"


def _said(speed: Interval) -> str:
    if speed.high > NOISE * speed.low:
        return "too noisy to tell"
    return f"{factor(speed)}{' (no change within the error)' if _unsure(speed) else ''}"


def _unsure(speed: Interval) -> bool:
    return speed.low <= 1 <= speed.high


def _smaller(what: str, ratios: Sequence[float | None]) -> str:
    changes = [100 * (1 / ratio - 1) for ratio in ratios if ratio]
    if not changes:
        return ""
    if max(changes) <= 0:
        return f"{what} {_range([-c for c in changes], _share)} smaller"
    if min(changes) >= 0:
        return f"{what} {_range(changes, _share)} larger"
    return f"{what} from {-min(changes):.0f} % smaller to {max(changes):.0f} % larger"


def _share(value: float) -> str:
    return f"{value + 0.0:.0f} %"  # no minus before a zero


def _range(values: Sequence[float], say: Callable[[float], str]) -> str:
    low, high = say(min(values)), say(max(values))
    return low if low == high else f"{low.removesuffix(' %')} to {high}"
