"""What `shortstack eval --early-exit` found, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shortstack.eval_report import Table, as_markdown

COLUMNS = (
    "rule",
    "accuracy",
    "difference",
    "layers saved",
    "time saved",
    "same answer",
)


def tables(data: Mapping[str, Any]) -> list[Table]:
    """One table a set, a row a rule."""
    return [
        Table(
            f"{result['set']} (n = {result['n']}, chance {result['chance']:.3f}, "
            f"majority {result['majority']:.3f}{_cut(result)})",
            COLUMNS,
            tuple(_row(entry) for entry in result["rules"]),
        )
        for result in data["results"]
    ]


def _cut(result: Mapping[str, Any]) -> str:
    cut = result.get("cut_prompts")  # not in records of before
    return f", {cut} prompts without their beginning" if cut else ""


def _row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    if "saved" not in entry:
        return (entry["rule"], _interval(entry["accuracy"], "{:.3f}"), "–", "–", "–", "–")
    return (
        entry["rule"],
        _interval(entry["accuracy"], "{:.3f}"),
        _interval(entry["difference"], "{:+.3f}"),
        _interval(entry["saved"], "{:.1%}"),
        _interval(entry["time_saved"], "{:.1%}"),
        f"{entry['same_answer']:.3f}",
    )


def _interval(found: Mapping[str, float], form: str) -> str:
    return "{} ({} to {})".format(*(form.format(found[k]) for k in ("estimate", "low", "high")))


def markdown(data: Mapping[str, Any]) -> str:
    what = (
        "ONNX graphs in onnxruntime"
        if data["runtime"] == "onnxruntime"
        else f"Checkpoint in {data['dtype']}"
    )
    lines = ["# Early exit", "", *as_markdown(tables(data))]
    lines += [
        f"{what} on {data['device']}. Intervals are 95 %: Wilson for "
        "accuracy, bootstrap over rows for the difference on the same rows and for layers, over "
        "batches for time. The time is that of all prompts, checks included, against the whole "
        "model's on the same batches in the same process.",
        "",
    ]
    return "\n".join(lines)


def show(data: Mapping[str, Any], quiet: bool) -> None:
    """The tables on standard output, then where everything is."""
    from shortstack import terminal

    if not quiet:
        for table in tables(data):
            terminal.print_table(table.title, table.columns, table.rows)
    terminal.print_facts({"folder": data["folder"]}, quiet=False)
