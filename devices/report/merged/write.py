"""Write report.html, report.md, report.csv and llama-bench.json of merged records."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from shortstack import __version__
from shortstack.devices.report.markdown import finite, md, md_facts, md_table
from shortstack.devices.report.merged import tables, words
from shortstack.devices.report.merged.depth import depth_lines
from shortstack.devices.report.merged.front import fronts
from shortstack.devices.report.merged.gain import gains
from shortstack.devices.report.merged.held import would_hold
from shortstack.devices.report.merged.llama_bench import llama_bench_rows, llama_bench_table
from shortstack.devices.report.merged.machine_table import machine_table
from shortstack.devices.report.merged.matrix import rows
from shortstack.devices.report.merged.merge import Merged
from shortstack.devices.report.merged.pictures import figures
from shortstack.devices.report.merged.roof import roofline
from shortstack.devices.report.merged.table_csv import to_csv
from shortstack.devices.report.render import environment
from shortstack.devices.report.view import Table
from shortstack.manifest import write_text

HERE = Path(__file__).parent
Section = dict[str, Any]


def write_merged(merged: Merged, out: Path) -> tuple[Path, ...]:
    """Write the four files into the folder `out`, each whole or not at all; returns their paths."""
    contents = {
        "report.html": to_html(merged),
        "report.md": to_markdown(merged),
        "report.csv": to_csv(merged, rows(merged.cases)),
        "llama-bench.json": to_llama_bench(merged),
    }
    for name, content in contents.items():
        write_text(out / name, content)
    return tuple(out / name for name in contents)


def to_llama_bench(merged: Merged) -> str:
    content = finite(llama_bench_rows(merged.cases))
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_html(merged: Merged) -> str:
    """One file: styles, charts and the script that sorts tables inside; nothing is fetched.

    The page's own policy forbids every other script and every request, so that no name in a
    record can cause one even if an escape were forgotten.
    """
    script = (HERE / "sort.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = "\n".join(
        file.read_text(encoding="utf-8")
        for file in (HERE.parent / "style.css", HERE / "merged.css")
    )
    return (
        environment(HERE)
        .get_template("merged.html.j2")
        .render(
            style=Markup(style),  # our own sheets and script, no record's words in them
            script=Markup(script),
            script_sha256=digest,
            version=__version__,
            **_content(merged),
        )
    )


def to_markdown(merged: Merged) -> str:
    """The same words and tables, without the charts."""
    c = _content(merged)
    parts = [f"# {md(c['headline'])}", md(c["lead"])]
    parts += md_facts("Read this first", c["warnings"])
    for section in c["sections"]:
        parts += [f"## {section['title']}", *map(md, section["text"])]
        parts += map(md_table, section["tables"])
        parts += md_facts(section["facts_title"], section["facts"])
    parts += ["## As llama-bench prints it", md(c["llama_bench_words"])]
    parts.append(llama_bench_table(llama_bench_rows(merged.cases)))
    parts += md_facts("Notes on the files", c["notes"])
    parts += md_facts("What the words mean", c["definitions"])
    parts += md_facts("Failures", c["failures"]) or ["## Failures", "None."]
    return "\n\n".join(parts) + "\n"


def _content(merged: Merged) -> dict[str, Any]:
    compared = rows(merged.cases)
    lines, best = depth_lines(merged.measured), fronts(merged)
    metric = None if merged.quality is None else merged.quality.metric
    places = list(dict.fromkeys(case.place for case in merged.cases))
    gained = gains(merged.measured)
    return {
        "headline": words.headline(merged),
        "lead": words.lead(merged, compared),
        "warnings": words.warnings(merged.cases),
        "figures": figures(lines, best, metric),
        "sections": [
            _section("machines", "The machines", machine_table(merged.machines)),
            _section(
                "runs-this",
                "Which of them runs this",
                tables.runs_this(merged),
                would_hold(merged.cases),
                tables.projected(merged.projected),
            ),
            _section("speed", "Speed", tables.side_by_side(compared, places), tables.speed(merged)),
            _section("depth", "Cost of depth", tables.depth(lines), tables.gain(gained)),
            _section(
                "best",
                "Best buys",
                tables.pareto(best, metric),
                text=(words.quality_words(merged),),
            ),
            *_roofline(merged),
            _section("memory", "Memory", tables.memory(merged)),
            {
                **_section("energy", "Energy", tables.energy(merged)),
                "facts_title": "Where energy is missing",
                "facts": words.energy_words(merged),
            },
            _section("runs", "The runs", words.runs(merged)),
        ],
        "llama_bench_words": words.llama_bench_words(merged),
        "notes": words.notes(merged),
        "definitions": words.DEFINITIONS,
        "failures": words.failures(merged),
    }


def _roofline(merged: Merged) -> list[Section]:
    if merged.share_of is None:
        return []
    table = roofline(merged.measured, merged.share_of)
    return [_section("roofline", "Share of the roofline", table)]


def _section(id_: str, title: str, *found: Table, text: tuple[str, ...] = ()) -> Section:
    kept = [table for table in found if table.rows]
    return {
        "id": id_,
        "title": title,
        "tables": kept,
        "text": text or (() if kept else ("Nothing to show: no record holds it.",)),
        "facts_title": "",
        "facts": [],
    }
