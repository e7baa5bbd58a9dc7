"""Write report.json, report.md and report.html: one set of words, three shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from shortstack.devices.report import depth, details, view
from shortstack.devices.report.charts import number
from shortstack.devices.report.compare import Comparison, speedups
from shortstack.devices.report.data import ORIGINAL, ReportData
from shortstack.devices.report.figures import figures, layer_scores
from shortstack.devices.report.headline import gains, headline
from shortstack.devices.report.markdown import finite, md, md_facts, md_table
from shortstack.devices.visible import visible
from shortstack.manifest import write_text

HERE = Path(__file__).parent


def write_report(data: ReportData, out: Path) -> tuple[Path, Path, Path]:
    """Write the three files into the folder `out`, each whole or not at all.

    Returns the paths of report.html, report.md and report.json. The last has every text as it
    is, the others have control characters written out.
    """
    paths = out / "report.html", out / "report.md", out / "report.json"
    shown = ReportData.from_dict(visible(data.to_dict()))
    contents = to_html(shown), to_markdown(shown), to_json(data)
    for path, content in zip(paths, contents, strict=True):
        write_text(path, content)
    return paths


def to_json(data: ReportData) -> str:
    """All data, and the comparisons drawn from it."""
    content = {**data.to_dict(), "comparisons": [_plain(c) for c in speedups(data.entries)]}
    return json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def environment(folder: Path) -> Environment:
    """Templates of a folder: every name from a record is escaped, and none may be missing."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def to_html(data: ReportData) -> str:
    """One file: styles and charts inside, no script, nothing fetched."""
    style = (HERE / "style.css").read_text(encoding="utf-8")
    return (
        environment(HERE)
        .get_template("template.html.j2")
        .render(
            style=Markup(style),  # our own sheet, no user's words in it
            cards=_cards(data),
            figures=figures(data, speedups(data.entries)),
            layers=layer_scores(data),
            **_content(data),
        )
    )


def to_markdown(data: ReportData) -> str:
    """The same words and tables, without the charts."""
    c = _content(data)
    parts = [f"# {md(c['headline'])}", md(c["gains"])]
    parts += md_facts("Read this first", c["warnings"])
    parts += ["## What it costs and what it gains", *map(md_table, c["result_tables"])]
    parts += ["## What was verified"]
    parts += [md_table(c["verified"]) if c["verified"].rows else "Nothing was verified."]
    parts += md_facts("Notes on the files", c["notes"])
    parts += md_facts("How it was measured", c["method"])
    parts += md_facts("What the words mean", details.DEFINITIONS)
    parts += [md_table(c["conditions"])] if c["conditions"].rows else []
    parts += md_facts("Where it came from", c["origin"])
    if c["recipe"]:
        parts.append("```json\n" + c["recipe"].replace("```", "'''") + "\n```")
    parts += md_facts("Failures", c["failures"]) or ["## Failures", "None."]
    return "\n\n".join(parts) + "\n"


def _content(data: ReportData) -> dict[str, Any]:
    comparisons = speedups(data.entries)
    names = {entry.spec: view.spec_name(entry) for entry in data.entries}
    tables = (
        *depth.tables(data),
        view.comparison_table(comparisons, names),
        view.speed_table(data.entries),
        view.size_table(data.entries),
    )
    return {
        "data": data,
        "headline": headline(data),
        "gains": " ".join(
            [depth.gains(data.early_exit)] * bool(data.early_exit)
            + [gains(comparisons, names)] * bool(data.entries or not data.early_exit)
        ),
        "warnings": details.warnings(data),
        "result_tables": [table for table in tables if table.rows],
        "verified": view.verification_table(data.entries),
        "notes": details.notes(data),
        "method": details.method(data),
        "definitions": details.DEFINITIONS,
        "conditions": view.conditions_table(data.entries),
        "origin": details.origin(data),
        "recipe": details.recipe_text(data),
        "failures": details.failures(data),
    }


def _cards(data: ReportData) -> list[dict[str, str]]:
    """One card a comparison that has figures: what the cut does to this export."""
    names = {entry.spec: view.spec_name(entry) for entry in data.entries}
    found = {(*e.group, e.label): (e.verification or {}).get("perplexity") for e in data.entries}
    cards = []
    for c in speedups(data.entries):
        if c.decode_speedup is None:
            continue
        speed = c.decode_speedup
        both = [found.get((c.spec, c.runtime, label)) for label in (ORIGINAL, c.label)]
        cards.append(
            {
                "name": view.compared_name(c, names),
                "runtime": c.runtime,
                "value": f"{speed.estimate:.2f}",
                "interval": f"{speed.low:.2f} to {speed.high:.2f}",
                "perplexity": " \N{RIGHTWARDS ARROW} ".join(
                    view.NONE if value is None else number(value) for value in both
                ),
                "size": _less(c.size_ratio),
                "memory": _less(c.peak_ratio),
                "share": view.percent(c.gain_over_bytes),
            }
        )
    return cards


def _less(ratio: float | None) -> str:
    """`-17 %` for a ratio of original over pruned of 1.2."""
    if ratio is None:
        return view.NONE
    change = 100 * (1 / ratio - 1)
    sign = "\N{MINUS SIGN}" if round(change) < 0 else "+" if round(change) > 0 else ""
    return f"{sign}{abs(change):.0f} %"


def _plain(comparison: Comparison) -> dict[str, Any]:
    share = comparison.gain_over_bytes
    shown = {k: vars(v) if hasattr(v, "estimate") else v for k, v in vars(comparison).items()}
    return {**shown, "gain_over_bytes": vars(share) if share else None}
