"""The table of an export by kinds of tensors: what coding them saved, and why it was chosen."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

WORTH = "worth.json"
Row = Mapping[str, Any]


def read_worth(folder: Path) -> list[dict[str, Any]]:
    """The grouped rows of an export's folder; none where it has no table."""
    file = folder / WORTH
    return grouped(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else []


def grouped(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One line for tensors that differ in their layer alone and are coded alike.

    Bits are means over weights; speeds are all bytes over all seconds.
    """
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        stem = re.sub(r"\.\d+\.", ".*.", row["name"])
        groups[(stem, row["kind"], "+".join(row["coders"]), row["reason"])].append(row)
    return [_line(key, members) for key, members in groups.items()]


def _line(key: tuple[str, ...], rows: list[Row]) -> dict[str, Any]:
    plain, coded = (sum(row[size] for row in rows) for size in ("plain_bytes", "coded_bytes"))
    weights = sum(row["n_weights"] for row in rows)
    bits = sum(row["entropy_bits"] * row["n_weights"] for row in rows)
    return {
        **dict(zip(("tensors", "kind", "coders", "reason"), key, strict=True)),
        "n_tensors": len(rows),
        "entropy_bits": bits / max(1, weights),
        "coded_bits": 8 * coded / max(1, weights),
        "plain_bytes": plain,
        "coded_bytes": coded,
        "ratio": plain / max(1, coded),
        "encode_mb_s": _speed(rows, "encode_mb_s"),
        "decode_mb_s": _speed(rows, "decode_mb_s"),
    }


def _speed(rows: list[Row], name: str) -> float:
    seconds = sum(row["plain_bytes"] / max(row[name], 1e-9) for row in rows)
    return float(sum(row["plain_bytes"] for row in rows) / max(seconds, 1e-9))
