"""What a system keeps of a peak is used and named; where it keeps none, samples are."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import psutil
import pytest

from shortstack.devices import memory


class Elsewhere:
    """A process of a system that tells a total, and maybe a peak."""

    def __init__(self, peak_bytes: int | None) -> None:
        self._told = {"rss": 1000} | ({} if peak_bytes is None else {"peak_wset": peak_bytes})

    def memory_info(self) -> SimpleNamespace:
        return SimpleNamespace(**self._told)


def on(monkeypatch: pytest.MonkeyPatch, platform: str, peak_bytes: int | None) -> dict[str, object]:
    """The record of a sampler on another system."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(psutil, "Process", lambda: Elsewhere(peak_bytes))
    sampler = memory.Sampler()
    sampler.phase("load")
    return sampler.finish()


def test_windows_keeps_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    told = on(monkeypatch, "win32", 5000)
    assert told["peak_total_bytes"] == 5000
    assert "PeakWorkingSetSize" in str(told["method"])
    assert told["peak_anon_bytes"] is None
    assert told["why_no_split"]


def test_macos_keeps_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("resource")
    vars(fake).update(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=7000))
    monkeypatch.setitem(sys.modules, "resource", fake)
    told = on(monkeypatch, "darwin", None)
    assert told["peak_total_bytes"] == 7000
    assert "ru_maxrss" in str(told["method"])


def test_elsewhere_samples_are_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    told = on(monkeypatch, "freebsd14", None)
    assert told["peak_total_bytes"] == 1000
    assert told["method"] == memory.SAMPLED


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_linux_keeps_a_peak_and_tells_the_kinds_apart() -> None:
    sampler = memory.Sampler()
    sampler.phase("load")
    told = sampler.finish()
    assert "VmHWM" in told["method"]
    assert told["why_no_split"] is None
    assert told["peak_total_bytes"] >= told["baseline"]["total_bytes"] > 0
