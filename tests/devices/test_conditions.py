"""Snapshots of devices, and what two of them tell."""

from __future__ import annotations

import os
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from shortstack.devices import conditions
from shortstack.devices.conditions import flags, snapshot

from .fake_nvml import FakeCard, NotSupported, plug_in, process

Battery = namedtuple("Battery", "percent secsleft power_plugged")


@pytest.fixture(autouse=True)
def a_plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No battery, no container: what a test does not set is not there."""
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None, raising=False)
    monkeypatch.setattr(conditions, "container", lambda: None)


def test_a_card_tells_its_moment_in_our_units(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"nvmlDeviceGetViolationStatus": SimpleNamespace(violationTime=2_500_000_000)}
    plug_in(monkeypatch, FakeCard("GPU-a", says=held))
    assert snapshot("cuda:0") == {
        "sm_clock_mhz": 1755,
        "memory_clock_mhz": 1755,
        "temperature_c": 41,
        "power_w": 71.5,
        "throttle_reasons": ["idle"],
        "held_back_s": {
            name: 2.5 for name in ("power", "thermal", "sync boost", "board limit", "reliability")
        },
        "gpu_busy_share": 0.35,
        "memory_busy_share": 0.10,
        "pcie_generation": 1,
        "pcie_width": 16,
        "other_processes": 0,
    }


def test_a_mute_card_gives_none_and_does_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(
        monkeypatch, FakeCard("GPU-a", says=dict.fromkeys(FakeCard("").answers(), NotSupported))
    )
    told = snapshot("cuda:0")
    assert told["power_w"] is told["throttle_reasons"] is told["other_processes"] is None
    assert told["held_back_s"] == {}
    assert "does not list" in told["other_processes_reason"]
    assert flags(told, told) == []


def test_no_driver_no_card_and_no_counters_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, driver=False)
    assert "no NVIDIA driver" in snapshot("cuda:0")["reason"]
    assert "no counters" in snapshot("metal:0")["reason"]


def test_our_own_processes_are_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = os.getppid()
    fake = FakeCard("GPU-a", compute=[process(os.getpid(), 1), process(parent, 2)])
    plug_in(monkeypatch, fake)
    told = snapshot("cuda:0")
    assert told["other_processes"] == 1
    assert flags({}, told) == ["foreign process: 1 on the device"]
    fake.compute.pop()
    assert snapshot("cuda:0")["other_processes"] == 0


@pytest.mark.parametrize("pids", [[], [2**22 + 7]])
def test_in_a_container_others_cannot_be_counted(
    monkeypatch: pytest.MonkeyPatch, pids: list[int]
) -> None:
    monkeypatch.setattr(conditions, "container", lambda: "docker")
    plug_in(monkeypatch, FakeCard("GPU-a", compute=[process(pid, 1) for pid in pids]))
    told = snapshot("cuda:0")
    assert told["other_processes"] is None
    assert "container" in told["other_processes_reason"]
    assert flags(told, told) == []


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"throttle_reasons": ["idle"]}, {"throttle_reasons": ["application clocks"]}, None),
        (
            {"throttle_reasons": ["idle"]},
            {"throttle_reasons": ["hardware slowdown", "software power cap"]},
            "hardware slowdown, software power cap",
        ),
        ({"held_back_s": {"power": 1.0}}, {"held_back_s": {"power": 1.005}}, None),
        (
            {"held_back_s": {"power": 1.0, "thermal": 2.0}},
            {"held_back_s": {"power": 1.25, "thermal": 2.0}},
            "power policy for 0.25 s",
        ),
        ({"throttle_events": 4}, {"throttle_events": 4}, None),
        ({"throttle_events": 4}, {"throttle_events": 9}, "heat slowed the processor down"),
        ({}, {"throttle_events": 9}, None),
    ],
)
def test_throttling_between_two_moments_is_flagged(
    before: dict[str, Any], after: dict[str, Any], words: str | None
) -> None:
    assert flags(before, after) == ([f"throttled: {words}"] if words else [])


def test_a_card_that_goes_away_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCard("GPU-a")
    plug_in(monkeypatch, fake)
    before = snapshot("cuda:0")
    fake.lost = True
    (flag,) = flags(before, snapshot("cuda:0"))
    assert flag.startswith("device lost: cuda:0")


@pytest.mark.parametrize("plugged", [True, False])
def test_a_laptop_says_whether_it_runs_on_its_battery(
    monkeypatch: pytest.MonkeyPatch, plugged: bool
) -> None:
    battery = Battery(80, 3600, plugged)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    told = snapshot("cpu")
    assert told["on_battery"] is not plugged
    assert ("on battery" in flags(told, told)) is not plugged


@pytest.mark.skipif(sys.platform != "linux", reason="throttle counts are files of Linux")
def test_the_processor_tells_heat_and_how_often_it_slowed_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for core in range(2):
        folder = tmp_path / f"cpu{core}/thermal_throttle"
        folder.mkdir(parents=True)
        (folder / "core_throttle_count").write_text("3\n", encoding="ascii")
        (folder / "package_throttle_count").write_text("1\n", encoding="ascii")
    sensors = {"coretemp": [SimpleNamespace(current=61.0), SimpleNamespace(current=64.0)]}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: sensors, raising=False)
    monkeypatch.setattr(conditions, "CPU", tmp_path)
    assert snapshot("cpu") == {"temperature_c": 64.0, "throttle_events": 8}


def test_a_bare_processor_tells_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(psutil, "sensors_temperatures", dict, raising=False)
    monkeypatch.setattr(conditions, "CPU", tmp_path)
    assert snapshot("cpu") == {}
