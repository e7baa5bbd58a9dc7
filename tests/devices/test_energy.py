"""Known joules through known counters: wrap, permission, loss, short windows."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shortstack.devices import energy, nvidia
from shortstack.devices.energy import CounterLostError, Meter, NvmlCounter

from .fake_nvml import FakeCard, NoPermission, plug_in


@dataclass
class FakeTime:
    now_s: float = 0.0
    load_w: float = 0.0
    """What runs draws this much above `idle_w`."""
    idle_w: float = 60.0
    used_j: float = 0.0

    def clock(self) -> float:
        return self.now_s

    def pass_by(self, seconds: float, watts: float) -> None:
        self.now_s += seconds
        self.used_j += seconds * watts

    def sleep(self, seconds: float) -> None:
        self.pass_by(seconds, self.idle_w)

    def work(self) -> int:
        """2 s at 300 W for 100 tokens."""
        self.pass_by(2.0, 300.0)
        return 100


@dataclass
class FakeCounter:
    time: FakeTime
    method: str = "fake"
    scope: str = "gpu"
    longest_s: float = float("inf")
    dies_after: int = 1_000_000
    reads: int = field(default=0)

    def read(self) -> tuple[int, ...]:
        self.reads += 1
        if self.reads > self.dies_after:
            raise CounterLostError("cuda:0 went away: GPU is lost.")
        return (round(1000 * self.time.used_j),)

    def joules(self, start: tuple[int, ...], end: tuple[int, ...]) -> float:
        return (end[0] - start[0]) / 1000


def a_meter(counter: FakeCounter) -> Meter:
    return Meter([counter], clock=counter.time.clock, sleep=counter.time.sleep)


def test_known_power_gives_known_joules_gross_and_net() -> None:
    time = FakeTime()
    meter = a_meter(FakeCounter(time))
    meter.idle(10.0)
    (entry,) = meter.measure(time.work, "decode", 9.0)
    assert entry == {
        "method": "fake",
        "scope": "gpu",
        "phase": "decode",
        "tokens": 500,
        "window_s": 10.0,
        "gross_j": 3000.0,
        "idle_w": 60.0,
        "idle_window_s": 10.0,
        "net_j": 2400.0,
    }
    assert energy.flags([entry]) == []


def test_without_an_idle_window_there_is_no_net() -> None:
    time = FakeTime()
    (entry,) = a_meter(FakeCounter(time)).measure(time.work, "prefill", 10.0)
    assert entry["idle_w"] is entry["net_j"] is None
    assert energy.flags([entry]) == []


def test_short_windows_are_flagged() -> None:
    time = FakeTime()
    meter = a_meter(FakeCounter(time))
    meter.idle(1.0)
    entries = meter.measure(time.work, "decode", 1.0)
    assert energy.flags(entries) == [
        "short window: decode 2.0 s of 10 s for energy",
        "short window: idle 1.0 s of 10 s for energy",
    ]


def test_a_window_in_which_a_counter_may_come_round_twice_is_refused() -> None:
    time = FakeTime()
    counter = FakeCounter(time, longest_s=9.0)
    with pytest.raises(CounterLostError, match="10 s is longer than the 9 s"):
        a_meter(counter).measure(time.work, "decode", 10.0)


def test_nvml_counts_millijoules_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"nvmlDeviceGetTotalEnergyConsumption": [5_000_000_000_000, 5_000_003_500_250]}
    plug_in(monkeypatch, FakeCard("GPU-a", says=said))
    counter = NvmlCounter(nvidia.card("cuda:0"))
    assert counter.joules(counter.read(), counter.read()) == 3500.25


def test_an_nvml_counter_that_goes_back_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, FakeCard("GPU-a"))
    with pytest.raises(CounterLostError, match="went back"):
        NvmlCounter(nvidia.card("cuda:0")).joules((10,), (9,))


@pytest.fixture
def zones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a powercap folder: zone -> (name, energy_uj); the first call's range is 1000 J."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)

    def make(**packages: tuple[str, int]) -> Path:
        for key, (name, microjoules) in packages.items():
            zone = tmp_path / f"intel-rapl:{key.replace('_', ':')[1:]}"
            zone.mkdir(exist_ok=True)
            (zone / "name").write_text(f"{name}\n", encoding="ascii")
            (zone / "max_energy_range_uj").write_text("1000000000\n", encoding="ascii")
            (zone / "energy_uj").write_text(f"{microjoules}\n", encoding="ascii")
        return tmp_path

    return make


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="RAPL is read through Linux files")


@LINUX
def test_rapl_adds_packages_up_and_survives_coming_round(zones: Callable[..., Path]) -> None:
    parts = {"z0_0": ("core", 5), "z2": ("psys", 7)}
    zones(z0=("package-0", 999_000_000), z1=("package-1", 10_000_000), **parts)
    counter = energy.rapl()
    start = counter.read()
    zones(z0=("package-0", 4_000_000), z1=("package-1", 12_500_000))
    assert counter.joules(start, counter.read()) == pytest.approx(5 + 2.5)
    assert len(counter.zones) == 2
    assert counter.longest_s == 1.0


@LINUX
def test_a_record_holds_the_joules_that_the_work_used(zones: Callable[..., Path]) -> None:
    """Through files, the real clock and a counter that comes round: 5 J a turn."""
    state = {"microjoules": 998_000_000}
    zones(z0=("package-0", state["microjoules"]))

    def work() -> int:
        state["microjoules"] = (state["microjoules"] + 5_000_000) % 1_000_000_000
        zones(z0=("package-0", state["microjoules"]))
        return 20

    told = energy.measured("cpu", {"prefill": work, "decode": work}, window_s=0, idle_s=0)
    assert told["energy_reason"] is None
    assert [(e["phase"], e["tokens"]) for e in told["energy"]] == [("prefill", 20), ("decode", 20)]
    assert [e["gross_j"] for e in told["energy"]] == [5.0, 5.0]
    assert [e["net_j"] for e in told["energy"]] == [5.0, 5.0]
    assert len(energy.flags(told["energy"])) == 3


@LINUX
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read all")
def test_a_real_missing_permission_says_how_to_get_it(zones: Callable[..., Path]) -> None:
    zones(z0=("package-0", 5)).joinpath("intel-rapl:0/energy_uj").chmod(0)
    with pytest.raises(nvidia.NoAnswerError, match=r"only root may read RAPL.*sudo chmod a\+r"):
        energy.rapl()


@LINUX
def test_a_missing_permission_says_how_to_get_it(
    zones: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    zones(z0=("package-0", 5))
    read = Path.read_text

    def refusing(path: Path, *arguments: str, **named: str) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *arguments, **named)

    monkeypatch.setattr(Path, "read_text", refusing)
    found, (reason,) = energy.counters("cpu")
    assert found == []
    assert "only root may read RAPL" in reason
    assert "sudo chmod a+r" in reason
    assert "\n" not in reason


@LINUX
def test_garbage_and_vanished_counters_are_reasons(zones: Callable[..., Path]) -> None:
    folder = zones(z0=("package-0", 5))
    counter = energy.rapl()
    (folder / "intel-rapl:0/energy_uj").unlink()
    with pytest.raises(CounterLostError, match="cannot be read any more"):
        counter.read()
    (folder / "intel-rapl:0/energy_uj").write_text("many\n", encoding="ascii")
    with pytest.raises(nvidia.NoAnswerError, match="RAPL does not answer"):
        energy.rapl()


def test_a_machine_without_counters_says_so(zones: Callable[..., Path]) -> None:
    zones()
    told = energy.measured("cpu", {"decode": lambda: 1})
    assert told["energy"] == []
    assert "cpu package" in told["energy_reason"]


@LINUX
def test_a_card_is_measured_with_the_processor_that_feeds_it(
    zones: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, FakeCard("GPU-a"))
    zones(z0=("package-0", 5))
    found, reasons = energy.counters("cuda:0")
    assert [counter.scope for counter in found] == ["gpu", "cpu package"]
    assert reasons == []


def test_reasons_of_both_are_told(
    zones: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    zones()
    plug_in(monkeypatch, FakeCard("a", says={"nvmlDeviceGetTotalEnergyConsumption": NoPermission}))
    found, reasons = energy.counters("cuda:0")
    assert found == []
    assert "Insufficient Permissions" in reasons[0]
    assert "cpu package" in reasons[1]
    assert "metal:0" in energy.counters("metal:0")[1][0]


def test_what_was_measured_before_a_device_went_away_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    time = FakeTime()
    counter = FakeCounter(time, dies_after=5)  # idle and prefill take two readings each
    monkeypatch.setattr(energy, "counters", lambda device_id: ([counter], []))
    monkeypatch.setattr(energy, "Meter", lambda found: a_meter(counter))
    told = energy.measured("cuda:0", {"prefill": time.work, "decode": time.work})
    assert [entry["phase"] for entry in told["energy"]] == ["prefill"]
    assert told["energy_reason"] == "cuda:0 went away: GPU is lost."


def test_work_that_fails_is_not_taken_for_a_lost_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    time = FakeTime()
    counter = FakeCounter(time)
    monkeypatch.setattr(energy, "counters", lambda device_id: ([counter], []))
    monkeypatch.setattr(energy, "Meter", lambda found: a_meter(counter))

    def breaks() -> int:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        energy.measured("cuda:0", {"decode": breaks})
