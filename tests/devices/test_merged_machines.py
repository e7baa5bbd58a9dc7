"""The merged report: which machine a record is of, and what it is called."""

from __future__ import annotations

import pytest

from shortstack.devices.report.merged import Merged, merge
from shortstack.devices.report.merged.machine_table import machine_table
from shortstack.errors import ShortstackError

from .bench_sample import (
    CARD,
    LAPTOP,
    SERVER,
    bench,
    laptop_run,
    measurement,
    server_run,
    workload,
)
from .merged_sample import Load, cells


def test_machines_are_named_by_their_parts(both: Merged) -> None:
    assert [m.name for m in both.machines] == [
        "Example Core 7 CPU, 8 cores, 32.0 GB",
        "Example Server 99, 48 cores, 512 GB, Example H9",
    ]
    assert [c.place.name for c in both.cases if c.run == 2][0] == "Example H9"
    text = str(machine_table(both.machines))
    for words in ("driver 999.1", "141 GB", "700 W", "docker container", "reads 40.0 GB/s"):
        assert words in text


def test_machines_of_one_name_get_letters(load: Load) -> None:
    other_card = {**SERVER, "devices": [SERVER["devices"][0], {**CARD, "uuid_sha256": "6" * 64}]}
    other = bench(
        [measurement("original", 30, host=other_card, device="cuda:0")], run="b", host=other_card
    )
    merged = merge(load(server_run("a"), other))
    assert [m.name[-2:] for m in merged.machines] == [" A", " B"]
    assert {c.place.name for c in merged.cases} == {"Example H9 A", "Example H9 B"}


def test_equal_cards_in_unlike_machines_get_letters(load: Load) -> None:
    small = {**SERVER, "ram_bytes": 64_000_000_000}
    other = bench([measurement("original", 30, host=small, device="cuda:0")], run="b", host=small)
    merged = merge(load(server_run("a"), other, laptop_run()))
    names = list(dict.fromkeys(c.place.name for c in merged.cases))
    assert names == ["Example H9 A", "Example H9 B", "Example Core 7 CPU"]


def test_a_machine_after_an_update_is_the_same_machine(load: Load) -> None:
    later = {**LAPTOP, "kernel": "Linux 6.9", "ram_bytes": LAPTOP["ram_bytes"] - 4096}
    later["libraries"] = {"numpy": "9"}
    again = bench([measurement("original", 30, host=later, seed=1)], run="again", host=later)
    merged = merge(load(laptop_run(), again))
    assert len(merged.machines) == 1
    assert merged.machines[0].runs == (1, 2)
    assert str(cells(merged, "original, GGUF")[0]).count(";") == 1


def test_a_laptop_measured_through_vulkan_is_the_same_machine(load: Load) -> None:
    shown_by_llama = measurement("original", 30, device="vulkan:0")
    shown_by_llama["device_info"] = {"id": "vulkan:0", "name": "Example graphics"}
    merged = merge(load(laptop_run(), bench([shown_by_llama], run="vulkan")))
    (machine,) = merged.machines
    assert [id_ for id_, _ in machine.gpus] == ["vulkan:0"]
    assert {c.place.name for c in merged.cases} == {"Example Core 7 CPU CPU", "Example graphics"}


def test_other_threads_on_one_machine_are_other_work(load: Load) -> None:
    slow = measurement("original", 30, work=workload(threads=2))
    cases = [measurement("original", 30), measurement("original", 30, seed=2)]
    merged = merge(load(bench(cases), bench([slow], run="2")))
    assert "other workload (threads 2 against 8)" in str(cells(merged, "original"))


def test_two_cards_of_one_machine_are_told_apart(load: Load) -> None:
    host = {**SERVER, "devices": [*SERVER["devices"], {**CARD, "id": "cuda:1"}]}
    cases = [measurement("original", 30, host=host, device=f"cuda:{n}") for n in (0, 1)]
    merged = merge(load(bench(cases, host=host)))
    assert [c.place.name for c in merged.cases] == ["Example H9 (cuda:0)", "Example H9 (cuda:1)"]
    assert "2 x Example H9" in merged.machines[0].name


def test_no_record_without_a_measurement_makes_a_report(load: Load) -> None:
    with pytest.raises(ShortstackError, match="no measurement"):
        merge(load(bench([])))
