"""The merged report: like beside like, unlike marked with its reason."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Any

import pytest

from shortstack.devices.report.merged import Merged, merge
from shortstack.devices.report.merged.front import fronts
from shortstack.devices.report.merged.gain import gains
from shortstack.devices.report.merged.matrix import rows
from shortstack.devices.report.merged.table_csv import to_csv
from shortstack.devices.report.merged.unlike import why_unlike

from .bench_sample import (
    LAPTOP,
    SERVER,
    Json,
    bench,
    laptop_run,
    measurement,
    server_run,
    sha,
    workload,
)
from .merged_sample import Load, cells, two_machines


def test_a_file_on_two_machines_stands_in_one_row(both: Merged) -> None:
    laptop, server = cells(both, "original, GGUF")
    assert laptop
    assert server
    assert float(server.split()[0]) == pytest.approx(9 * float(laptop.split()[0]), rel=0.02)


def test_one_file_under_two_labels_stands_in_one_row(load: Load) -> None:
    merged = two_machines(load, lambda m: m.update(label="whole"))
    assert all(cells(merged, "original"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(prompt_sha256="a" * 64), "other prompt (aaaaaaaa against dddddddd)"),
        (
            lambda m: m["artifact"].update(sha256="b" * 64),
            f"other artifact (bbbbbbbb against {sha('original', 30, 'gguf:Q8_0')[:8]})",
        ),
        (
            lambda m: m["workload"].update(warmup_decode_tokens=0),
            "other workload (warmup_decode_tokens 0 against 8)",
        ),
        (
            lambda m: (m["workload"].update(warmup_prompt_tokens=16), m.update(device="cpu")),
            "other workload (warm-up prompt 16 tokens against 128)",
        ),
        (lambda m: m["protocol"].update(decoding="sampled"), "other protocol (decoding)"),
        (lambda m: m["protocol"].update(steady=True), "other protocol (steady)"),
        (
            lambda m: m["runtime_info"].update(version="2.0"),
            "other runtime major (2 against 1)",
        ),
        (
            lambda m: m["runtime_info"].update(kv_cache="Q4_0"),
            "other KV cache (Q4_0 against F16)",
        ),
    ],
)
def test_an_unlike_cell_says_why(load: Load, change: Callable[[Json], Any], words: str) -> None:
    laptop, server = cells(two_machines(load, change), "original")
    assert "not comparable" not in (laptop or "")
    assert server == f"not comparable: {words}"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["protocol"].update(seed=7, timeout_s=1.0),
        lambda m: m["workload"].update(repeats=12, threads=48),
        lambda m: m["runtime_info"].update(version="1.99"),
        lambda m: m.update(prompt_source="called otherwise"),
        lambda m: m["workload"].update(warmup_prompt_tokens=4096),
        lambda m: m["workload"].update(warmup_prompt_tokens=16),  # of a card, against a CPU
    ],
)
def test_what_moves_no_median_is_no_difference(load: Load, change: Callable[[Json], Any]) -> None:
    assert "not comparable" not in str(cells(two_machines(load, change), "original"))


def test_below_one_the_minor_version_counts(load: Load) -> None:
    def older(record: Json, version: str) -> Json:
        for m in record["measurements"]:
            m["runtime_info"]["version"] = version
        return record

    mixed = merge(load(older(laptop_run(), "0.3.36"), older(server_run(), "0.4.1")))
    assert "other runtime major (0.4 against 0.3)" in str(cells(mixed, "original, GGUF"))
    near = merge(load(older(laptop_run("x"), "0.3.36"), older(server_run("y"), "0.3.2")))
    assert "not comparable" not in str(cells(near, "original, GGUF"))


def test_the_majority_is_the_measure(load: Load) -> None:
    odd = laptop_run("odd")
    for m in odd["measurements"]:
        m["prompt_sha256"] = "a" * 64
        m["host"] = odd["host"] = {**LAPTOP, "ram_bytes": 8_000_000_000}
    third = bench([measurement("original", 30, host=SERVER)], run="3", host=SERVER)
    merged = merge(load(odd, laptop_run(), third))
    told = cells(merged, "original, GGUF")
    assert [bool(cell and "other prompt" in cell) for cell in told] == [True, False, False]


def test_two_files_of_one_name_on_one_machine_are_two_rows(load: Load) -> None:
    one, two = measurement("m", 30), measurement("m", 30)
    two["artifact"]["sha256"] = "b" * 64
    merged = merge(load(bench([one, two])))
    assert len(rows(merged.cases)) == 2


def test_other_work_is_another_row(load: Load) -> None:
    deep = measurement("original", 30, work=workload(depth_tokens=4096))
    merged = merge(load(bench([measurement("original", 30), deep])))
    assert [row.shape.words for row in rows(merged.cases)] == [
        "prompt 128, decode 16",
        "prompt 128, decode 16, depth 4096",
    ]


def test_other_options_are_other_work(load: Load) -> None:
    cases = [measurement("original", 30), measurement("cut24", 24)]
    cases[1]["options"] = {"kv_type": "q4_0"}
    merged = merge(load(bench(cases)))
    assert [row.shape.words for row in rows(merged.cases)] == [
        "prompt 128, decode 16",
        "prompt 128, decode 16, kv_type q4_0",
    ]
    assert why_unlike(merged.cases[1], merged.cases[0], artifact=False) == [
        "other option (kv_type q4_0 against not set)"
    ]
    assert gains(merged.measured) == []
    assert fronts(merged) == []
    lines = list(csv.DictReader(io.StringIO(to_csv(merged, rows(merged.cases)))))
    assert [line["options"] for line in lines] == ["", "kv_type q4_0"]
