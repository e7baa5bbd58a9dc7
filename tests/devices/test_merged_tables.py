"""The merged report: what each table and sentence tells."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from shortstack.devices.report.merged import Merged, merge
from shortstack.devices.report.merged import tables as shown
from shortstack.devices.report.merged.held import would_hold
from shortstack.devices.report.merged.matrix import rows
from shortstack.devices.report.merged.table_csv import to_csv
from shortstack.devices.report.merged.words import energy_words, lead, warnings
from shortstack.devices.report.merged.write import to_html, to_markdown
from shortstack.devices.stats import Interval

from .bench_sample import (
    SERVER,
    Json,
    bench,
    laptop_run,
    measurement,
    server_run,
    workload,
)
from .merged_sample import Load, cells, guess, two_machines
from .test_report import Page


def test_which_machine_runs_what_tells_the_share_of_memory(both: Merged) -> None:
    table = shown.runs_this(both)
    line = next(r for r in table.rows if r[0].startswith("original, GGUF") and "H9" in r[2])
    assert line[4] == "yes, in under 1 % of its memory"
    assert line[-1].replace("\N{NARROW NO-BREAK SPACE}", "") == "141000"


def test_what_was_not_run_on_a_machine_is_computed_for_it_and_marked(load: Load) -> None:
    small = {**SERVER, "ram_bytes": 4_000_000_000, "devices": SERVER["devices"][:1]}
    large = measurement("large", 3000)
    other = bench([measurement("small", 30, host=small)], run="2", host=small)
    merged = merge(load(bench([large]), other))
    table = would_hold(merged.cases)
    told = {(row[0].partition(",")[0], row[2]): row[4] for row in table.rows}
    assert told == {("large", "Example Server 99"): "no", ("small", "Example Core 7 CPU"): "yes"}
    assert table.caption.startswith("Projected, not measured")
    assert table.caption in to_html(merged)
    assert would_hold(merge(load(bench([large]))).cases).rows == ()


def test_a_model_that_failed_says_so(load: Load) -> None:
    record = laptop_run()
    record["measurements"][0] |= {
        "trials": [],
        "memory": [],
        "failure": {"kind": "error", "message": "needs 40 GB, there are 32 GB", "phase": "load"},
    }
    merged = merge(load(record))
    assert "no: needs 40 GB, there are 32 GB (during load)" in str(shown.runs_this(merged))
    assert cells(merged, "original, GGUF") == ["failed"]
    text = " ".join(Page(to_html(merged)).words)
    assert "1 did not work" in text


def test_a_record_without_trials_is_not_timed_and_did_not_fail(load: Load) -> None:
    merged = two_machines(load, lambda m: m.update(trials=[]))
    assert cells(merged, "original")[1] == "not timed"
    told = dict(warnings(merged.cases))
    why = next(why for where, why in told.items() if where.endswith("run 2"))
    assert "the record holds no trial and no failure. Measure it again" in why
    assert "did not work" not in to_html(merged)


def test_a_model_that_failed_elsewhere_failed_and_is_not_called_unlike(load: Load) -> None:
    def fail(m: Json) -> None:
        why = {"kind": "error", "message": "it does not fit", "phase": "load"}
        m |= {"trials": [], "memory": [], "runtime_info": {}, "failure": why}

    merged = two_machines(load, fail)
    assert cells(merged, "original")[1] == "failed"
    lines = list(csv.DictReader(io.StringIO(to_csv(merged, rows(merged.cases)))))
    assert {line["not_comparable"] for line in lines} == {""}
    assert "not comparable" not in lead(merged, rows(merged.cases))


def test_what_is_projected_is_marked_and_apart(load: Load) -> None:
    sizes = ((8e9, False), (24e9, True))
    guesses = (guess("Card X", 55.0, sizes), guess("Card Y", None, ()))
    merged = merge(load(laptop_run()), projected=guesses)
    assert not any("Card" in cell for row in shown.runs_this(merged).rows for cell in row)
    table = shown.projected(merged.projected)
    assert table.caption.startswith("Projected, not measured")
    said = str(table)
    for words in (
        "61.0 (55.0 to 110)",
        "'61.0'",
        "not known",
        "at most 12 %",
        "8.00 GB: no; 24.0 GB: yes",
    ):
        assert words in said
    assert to_html(merged).count('class="is-projected"') == 2
    assert "Projected, not measured" in to_markdown(merged)
    assert 'class="is-projected"' not in to_html(merge(load(server_run())))


@dataclass(frozen=True)
class HalfTheRoof:
    share: Interval | None = Interval(0.5, 0.4, 0.6, 6)
    unit: str = "bytes"
    reason: str | None = None
    notes: tuple[str, ...] = ("busy machine",)


def test_shares_of_the_roofline_are_taken_from_who_computes_them(load: Load) -> None:
    def share_of(record: Mapping[str, Any], ceilings: Mapping[str, Any]) -> Any:
        assert record["schema"] == 2
        assert record["artifact"]["weight_bytes_per_token"] > 0
        assert ceilings["cpu"]["read_bytes_per_s"] > 0
        return HalfTheRoof(), HalfTheRoof(None, "float32", "no ceiling for int4", ())

    records = load(bench([measurement("original", 30)]))
    text = to_markdown(merge(records, share_of=share_of))
    for words in ("50 % (40 to 60)", "no ceiling for int4", "busy machine"):
        assert words in text
    assert "Share of the roofline" not in to_markdown(merge(records))


def test_flags_of_all_are_said_once(load: Load) -> None:
    record = laptop_run()
    for m in record["measurements"]:
        m["flags"] = ["few repeats"]
    record["measurements"][0]["flags"] += ["noisy", "busy"]
    told = warnings(merge(load(record)).cases)
    assert told[0] == ("All 5 measurements", "few repeats")
    assert [flags for _, flags in told[1:]] == ["noisy; busy"]


def test_memory_and_energy_name_their_method(both: Merged) -> None:
    assert "device total over idle" in str(shown.memory(both))
    table = shown.energy(both)
    assert len(table.rows) == 3
    assert table.rows[0][6:9] == ("40.0", "30.0", "70.0")
    assert "no counter can be read" in to_markdown(both)


def test_why_a_part_of_the_energy_is_missing_is_told(load: Load) -> None:
    record = server_run()
    record["measurements"][0]["energy_reason"] = "prefill: the counter stood still"
    assert energy_words(merge(load(record))) == [("Example H9", "prefill: the counter stood still")]


def test_cold_and_warm_loads_are_apart(load: Load) -> None:
    record = bench([measurement("original", 30)])
    record["measurements"][0]["trials"][0]["load_s"] = 9.0
    row = shown.speed(merge(load(record))).rows[0]
    assert row[-3:] == ("0.300", "9.00", "6")


def test_a_batch_counts_all_its_sequences(load: Load) -> None:
    one = measurement("original", 30)
    eight = measurement("original", 30, work=workload(batch=8))
    a, b = merge(load(bench([one, eight]))).cases
    assert sum(b.decode_tokens_per_s) == pytest.approx(8 * sum(a.decode_tokens_per_s), rel=0.02)
    assert sum(b.decode_ms) == pytest.approx(sum(a.decode_ms), rel=0.02)
