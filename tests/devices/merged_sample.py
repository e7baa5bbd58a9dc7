"""What tests of the merged report share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from shortstack.devices.records import Record
from shortstack.devices.report.merged import Merged, Projected, merge
from shortstack.devices.report.merged.matrix import rows

from .bench_sample import (
    SERVER,
    Json,
    bench,
    laptop_run,
    measurement,
)

Load = Callable[..., list[Record]]


def cells(merged: Merged, title: str) -> list[str | None]:
    """The cells of one row of the side-by-side table."""
    places = list(dict.fromkeys(case.place for case in merged.cases))
    row = next(row for row in rows(merged.cases) if row.title.startswith(title))
    return [row.cell(place) for place in places]


def two_machines(load: Load, change: Callable[[Json], Any]) -> Merged:
    """A laptop's run, and that of a server whose only measurement is changed."""
    there = measurement("original", 30, host=SERVER, device="cuda:0", speed=9)
    mine = [measurement("original", 30), measurement("cut24", 24)]
    change(there := copy.deepcopy(there))
    return merge(load(bench(mine, run="1"), bench([there], run="2", host=SERVER)))


def hostile(words: str) -> Json:
    """Every text of a record replaced, but those that are read by rule."""
    record = laptop_run()
    m = record["measurements"][0]
    record |= {"command": words, "tool_version": words, "started_at": words}
    record["host"] |= {"os": words, "kernel": words, "container": words, "machine": words}
    record["host"]["cpu"] |= {"model": words, "isa": [words]}
    record["ceilings"] = {
        words: {
            "read_bytes_per_s": 1.0,
            "matmul_flops_per_s": {words: 1.0},
            "method": words,
            "samples": {words: words},
        }
    }
    m |= {"label": words, "runtime": words, "prompt_source": words, "flags": [words]}
    m |= {"device": words, "energy_reason": words, "prompt_sha256": words}
    m["device_info"] = {"name": words, "driver": words, "vram_bytes": 10**10}
    m["runtime_info"] |= {"version": words, "threads": words, "kv_cache": words}
    m["options"] = {words: words}
    m["artifact"] |= {"path": words, "notes": [words], "sha256": words}
    m["artifact"]["spec"] = {"format": words, "precision": words, "options": {words: words}}
    m["memory"][0]["method"] = words
    m["failure"] = {"kind": "error", "message": words, "phase": words}
    return record


EVIL = (
    '<script>alert("1")</script>|`*x*`\n# heading',
    "</style></title><img src=x onerror=alert(1)>",
    "'\"><a href=javascript:alert(1)>{{ 7 * 7 }}{% raw %}",
    "\x00\x1b[31m",
)


def guess(words: str, low: float | None, fits: tuple[tuple[float, bool], ...]) -> Projected:
    high = None if low is None else 2 * low
    error = "not known: one device was measured" if low is None else "at most 12 % on 3 devices"
    return Projected(words, words, words, words, 61.0, low, high, error, 1e9, fits, words)
