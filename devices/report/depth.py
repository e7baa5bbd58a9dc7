"""Depth as a choice, in words and tables: exits of one model, and a rule for when to leave it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shortstack import early_exit_report
from shortstack.devices.report.charts import number
from shortstack.devices.report.data import ReportData
from shortstack.devices.report.view import NONE, Table, factor, percent

RULE = "early exit"
"""The rule that was fitted, as early_exit.json calls it; others are there to be beaten."""
POSSESSIVE = "\N{RIGHT SINGLE QUOTATION MARK}s"


def tables(data: ReportData) -> list[Table]:
    """What the report has on depth, where it has something."""
    made = [exits_table(data.exits)] if data.exits else []
    found = early_exit_report.tables({"results": data.early_exit or ()})
    for result, table in zip(data.early_exit or (), found, strict=True):
        caption = (
            f"Early exit on {table.title}, PyTorch {result['dtype']} on {result['device']}; in "
            "brackets 95 % intervals, paired but for accuracy"
        )
        made.append(Table(caption, table.columns, table.rows, 1))
    return made


def exits_table(exits: Mapping[str, Any]) -> Table:
    whole = exits["depths"][-1]
    rows = tuple(
        (
            "whole model" if row is whole else f"exit at {row['depth']}",
            str(row["layers"]),
            _number(row["unseen_perplexity"]),
            factor(_ratio(row, whole)),
            _number(row["perplexity"]),
            _number(row["kl"]),
            percent(row["same_token"], 1),
        )
        for row in exits["depths"]
    )
    columns = (
        *("Depth", "Layers run", "Perplexity, unseen text", "Over the whole model"),
        *("Perplexity, selection text", "KL to the whole model, nat", "Same top token"),
    )
    caption = (
        f"Exits in PyTorch (init {exits['init']}, {exits['tokens']:,} training tokens); KL and top "
        "token on selection text, on which the best state was chosen"
    )
    return Table(caption, columns, rows, 1)


def headline(data: ReportData) -> str:
    """One sentence each on exits and on the early exit: what less depth costs."""
    said = [_exits_words(data.model.name, data.exits)] if data.exits else []
    said += [_early_words(data.model.name, result) for result in (data.early_exit or ())[:1]]
    return " ".join(said)


def gains(results: Sequence[Mapping[str, Any]] | None) -> str:
    """What the early exit saves, a set each."""
    parts = []
    for result in results or ():
        rule = _rule(result)
        layers, time = (_span(rule[key]) for key in ("saved", "time_saved"))
        parts.append(f"{layers} of the layers and {time} of the time on {result['set']}")
    return f"Leaving early saves {'; '.join(parts)}." if parts else ""


def _exits_words(name: str, exits: Mapping[str, Any]) -> str:
    whole = exits["depths"][-1]
    known = [(row["layers"], _ratio(row, whole)) for row in exits["depths"][:-1]]
    said = [
        f"{ratio:.2f} times at {layers}" for layers, ratio in reversed(known) if ratio is not None
    ]
    if not said:
        return f"{name} with exits: how much worse they are was not measured on unseen text."
    return (
        f"{name} with exits: perplexity on unseen text is, of that of all {whole['layers']} layers "
        f"({number(whole['unseen_perplexity'])}), {', '.join(said)}."
    )


def _early_words(name: str, result: Mapping[str, Any]) -> str:
    whole, rule = result["rules"][0], _rule(result)
    change = rule["difference"]
    return (
        f"{name} leaving early: accuracy {rule['accuracy']['estimate']:.3f} on {result['set']}, "
        f"the whole model{POSSESSIVE} is {whole['accuracy']['estimate']:.3f} (difference "
        f"{change['estimate']:+.3f}, {change['low']:+.3f} to {change['high']:+.3f})."
    )


def _rule(result: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(row for row in result["rules"] if row["rule"] == RULE)
    return found


def _ratio(row: Mapping[str, Any], whole: Mapping[str, Any]) -> float | None:
    ours, theirs = row["unseen_perplexity"], whole["unseen_perplexity"]
    return None if ours is None or not theirs else float(ours / theirs)


def _number(value: float | None) -> str:
    return NONE if value is None else number(value)


def _span(found: Mapping[str, float]) -> str:
    low, high = found["low"], found["high"]
    return f"{percent(found['estimate'], 1)} ({percent(low, 1)} to {percent(high, 1)})"
