"""Words, facts and tables as Markdown; values as JSON can hold them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from shortstack.devices.report.view import Table


def finite(value: Any) -> Any:
    """JSON has no NaN: a number that is none becomes null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value


def md_facts(title: str, facts: Sequence[tuple[str, str]]) -> list[str]:
    if not facts:
        return []
    return [f"## {title}", "\n".join(f"- **{md(key)}**: {md(value)}" for key, value in facts)]


def md_table(table: Table) -> str:
    rule = ["---" if i < table.text_columns else "---:" for i in range(len(table.columns))]
    rows = [table.columns, tuple(rule), *table.rows]
    head = "\n".join(
        "| " + " | ".join(md(cell) if n != 1 else cell for cell in row) + " |"
        for n, row in enumerate(rows)
    )
    return f"**{md(table.caption)}**\n\n{head}"


def md(words: str) -> str:
    """Plain text as Markdown: nothing of it may turn into markup, a cell, a new line or a
    command to a terminal."""
    folded = " ".join(re.sub(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]", "", words).split())
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", folded)
