"""The tables of docs/early_exit.md from records of `benchmarks.early_exit`.

    python -m benchmarks.early_exit_table docs/results/h200-early-exit/loss-0.5/early_exit.json

First every set with its rules on all test rows, then means over the sets: of all rows in batches,
and of the rows that ran one by one, where there are such.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.early_exit import means

HEAD = """\
| set | rule | accuracy | difference | layers saved | time saved, in batches | same answer |
|---|---|---:|---:|---:|---:|---:|"""


def interval(found: Mapping[str, float], scale: float, form: str) -> str:
    estimate, low, high = (scale * found[key] for key in ("estimate", "low", "high"))
    return f"{estimate:{form}} ({low:{form}} to {high:{form}})"


def lines(result: Mapping[str, Any]) -> list[str]:
    """The whole model's line has the set's size, chance and the share of its commonest answer."""
    name, found = result["set"].rpartition("/")[2], []
    for entry in result["rules"]:
        cells = [name, entry["rule"], f"{100 * entry['accuracy']['estimate']:.1f}"]
        if "saved" in entry:
            cells += [interval(entry["difference"], 100, "+.1f")]
            cells += [interval(entry[key], 100, ".1f") for key in ("saved", "time_saved")]
            cells += [f"{100 * entry['same_answer']:.1f}"]
        else:
            chance, majority = (100 * result[key] for key in ("chance", "majority"))
            cells[1] += f", {result['n']} rows, chance {chance:.0f}, commonest {majority:.0f}"
            cells += [""] * 4
        found.append(f"| {' | '.join(cells)} |")
    return found


def tables(data: Mapping[str, Any]) -> list[str]:
    told = [HEAD, *(line for result in data["results"] for line in lines(result))]
    told += ["", "Means over the sets, all rows in batches:", "", *means(data["results"])]
    single = [result["single"] for result in data["results"] if "single" in result]
    if single:
        told += ["", "Means over the sets, rows one by one:", "", *means(single)]
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("record", type=Path, nargs="+")
    for file in parser.parse_args().record:
        print("\n".join(tables(json.loads(file.read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main()
