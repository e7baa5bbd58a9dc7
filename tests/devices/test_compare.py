"""Only like is compared with like, round by round, and the answer is the known one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from shortstack.devices.measurement import Measurement
from shortstack.devices.report import Entry, speedups

from .sample import an_artifact, an_entry, crashed

SPEC = "gguf:Q8_0"


@pytest.fixture
def pair() -> tuple[Entry, Entry]:
    original = an_entry(
        "original", "llama.cpp", an_artifact("original", SPEC, 150, 120), 50, (9, 9)
    )
    pruned = an_entry("pruned", "llama.cpp", an_artifact("pruned", SPEC, 125, 100), 60, (6, 9))
    return original, pruned


def changed(entry: Entry, **fields: Any) -> Entry:
    assert entry.measurement is not None
    return dataclasses.replace(entry, measurement=dataclasses.replace(entry.measurement, **fields))


def measurement(entry: Entry) -> Measurement:
    assert entry.measurement is not None
    return entry.measurement


def test_speed_up_bytes_and_share_are_the_known_ones(pair: tuple[Entry, Entry]) -> None:
    (found,) = speedups(pair)
    assert found.reason is None
    assert found.paired
    assert found.decode_speedup is not None
    assert found.decode_speedup.estimate == pytest.approx(1.2, rel=0.01)
    assert found.decode_speedup.low <= 1.2 * 1.01
    assert found.decode_speedup.high >= 1.2 * 0.99
    assert found.bytes_ratio == pytest.approx(1.2)
    assert found.size_ratio == pytest.approx(1.2)
    assert found.peak_ratio == pytest.approx(1.2)
    assert found.gain_over_bytes is not None
    assert found.gain_over_bytes.estimate == pytest.approx(1.0, rel=0.01)


def test_order_of_entries_does_not_matter(pair: tuple[Entry, Entry]) -> None:
    assert speedups(pair) == speedups(pair[::-1])


def test_other_exports_and_runtimes_are_not_paired(pair: tuple[Entry, Entry]) -> None:
    original, pruned = pair
    assert speedups([original, dataclasses.replace(pruned, runtime="other")]) == []
    assert speedups([original, dataclasses.replace(pruned, spec="other")]) == []


def test_a_lost_round_falls_back_to_the_unpaired_interval(pair: tuple[Entry, Entry]) -> None:
    original, pruned = pair
    short = changed(pruned, trials=measurement(pruned).trials[1:])
    (found,) = speedups([original, short])
    assert not found.paired
    assert found.decode_speedup is not None
    assert found.decode_speedup.estimate == pytest.approx(1.2, rel=0.05)


def test_rounds_of_two_sittings_are_no_pairs(pair: tuple[Entry, Entry]) -> None:
    original, pruned = pair
    late = tuple(
        dataclasses.replace(t, conditions={**t.conditions, "sitting": 1})
        for t in measurement(pruned).trials
    )
    (found,) = speedups([original, changed(pruned, trials=late)])
    assert found.decode_speedup is not None
    assert not found.paired


def test_a_crash_gives_a_reason_and_keeps_the_sizes(pair: tuple[Entry, Entry]) -> None:
    original, pruned = pair
    (found,) = speedups([original, crashed(pruned)])
    assert found.reason == "pruned failed"
    assert found.decode_speedup is found.gain_over_bytes is None
    assert found.size_ratio == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"prompt_sha256": "0" * 64}, "prompt"),
        ({"host": {"cpu": {"model": "another"}}}, "machine"),
        ({"device": "cuda:0"}, "device"),
        ({"options": {"kv_type": "q8_0"}}, "options"),
        ({"protocol": {"order": "one after the other"}}, "protocol"),
        ({"runtime_info": {"version": "2.0"}}, "runtime version"),
    ],
)
def test_unlike_measurements_are_refused_by_name(
    pair: tuple[Entry, Entry], fields: dict[str, Any], word: str
) -> None:
    original, pruned = pair
    (found,) = speedups([original, changed(pruned, **fields)])
    assert found.decode_speedup is None
    assert found.reason is not None
    assert word in found.reason


def test_another_workload_is_refused(pair: tuple[Entry, Entry]) -> None:
    original, pruned = pair
    other = dataclasses.replace(measurement(pruned).workload, threads=7)
    (found,) = speedups([original, changed(pruned, workload=other)])
    assert found.reason == "measured under another workload"


def test_an_artifact_without_measurement_says_so(pair: tuple[Entry, Entry]) -> None:
    original, pruned = pair
    (found,) = speedups([original, dataclasses.replace(pruned, measurement=None)])
    assert found.reason == "not measured on both sides"
