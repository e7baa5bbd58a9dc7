"""Known bytes on a fake card: baseline, peaks by phase, our share, what is hidden."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from shortstack.devices import vram
from shortstack.devices.vram import Sampler

from .fake_nvml import FakeCard, NotSupported, plug_in, process

GB = 1_000_000_000


def watching(monkeypatch: pytest.MonkeyPatch, fake: FakeCard) -> Sampler:
    """A sampler whose thread sleeps: the phases' own samples are all there is."""
    monkeypatch.setattr(vram, "INTERVAL_S", 60.0)
    plug_in(monkeypatch, fake)
    sampler, reason = vram.watch("cuda:0")
    assert reason is None
    assert sampler is not None
    return sampler


def test_peaks_are_told_by_phase_and_over_what_was_there_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeCard("GPU-a", used_bytes=2 * GB)
    sampler = watching(monkeypatch, fake)
    fake.used_bytes = 7 * GB
    sampler.phase("load")
    fake.used_bytes = 6 * GB
    sampler.phase("prefill")
    told = sampler.finish()
    assert told["baseline_bytes"] == 2 * GB
    assert told["peak_device_bytes"] == 7 * GB
    assert told["delta_bytes"] == 5 * GB
    assert told["phases"]["load"]["peak_device_bytes"] == 7 * GB
    assert told["phases"]["prefill"]["end_device_bytes"] == 6 * GB
    assert told["lost"] is None


def test_the_thread_sees_a_peak_between_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCard("GPU-a")
    plug_in(monkeypatch, fake)
    monkeypatch.setattr(vram, "INTERVAL_S", 0.001)
    sampler, _ = vram.watch("cuda:0")
    assert sampler is not None
    fake.used_bytes = 9 * GB
    seen = sampler._samples + 2
    while sampler._samples < seen:
        pass
    fake.used_bytes = GB
    assert sampler.finish()["peak_device_bytes"] == 9 * GB


def test_our_bytes_count_once_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = process(os.getpid(), 3 * GB), process(os.getppid(), 5 * GB)
    told = watching(
        monkeypatch, FakeCard("GPU-a", compute=[ours, theirs], graphics=[ours])
    ).finish()
    assert told["process_bytes"] == 3 * GB
    assert told["process_reason"] is None


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        ([], vram.NOT_LISTED),
        ([process(2**22 + 7, GB)], vram.NOT_LISTED),
        ([process(os.getpid(), None)], vram.WDDM),
    ],
)
def test_hidden_bytes_are_none_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, listed: list[SimpleNamespace], reason: str
) -> None:
    told = watching(monkeypatch, FakeCard("GPU-a", compute=listed)).finish()
    assert told["process_bytes"] is None
    assert told["process_reason"] == reason


def test_a_card_that_goes_away_keeps_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCard("GPU-a", used_bytes=2 * GB)
    sampler = watching(monkeypatch, fake)
    fake.used_bytes = 5 * GB
    sampler.phase("load")
    fake.lost = True
    sampler.phase("prefill")
    told = sampler.finish()
    assert told["peak_device_bytes"] == 5 * GB
    assert "cuda:0 went away" in told["lost"]


def test_a_card_without_figures_and_no_card_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, FakeCard("GPU-a", says={"nvmlDeviceGetMemoryInfo": NotSupported}))
    assert vram.watch("cuda:0")[0] is None
    assert "Not Supported" in (vram.watch("cuda:0")[1] or "")
    assert "no memory of its own" in (vram.watch("cpu")[1] or "")


def test_what_is_free_is_told_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, FakeCard("GPU-a", used_bytes=60 * GB))
    assert vram.free_bytes("cuda:0") == 20 * GB
    assert vram.free_bytes("cuda:1") is vram.free_bytes("metal:0") is None
    monkeypatch.setattr(vram, "memory_limit_bytes", lambda: None)
    assert (vram.free_bytes("cpu") or 0) > 10_000_000
    monkeypatch.setattr(vram, "memory_limit_bytes", lambda: 1000)
    assert vram.free_bytes("cpu") == 1000


class FakeAllocator:
    """torch.cuda's peaks since the last reset."""

    def __init__(self, begun: bool = True) -> None:
        self.begun, self.peak = begun, 0

    def is_initialized(self) -> bool:
        return self.begun

    def max_memory_allocated(self, number: int) -> int:
        return self.peak

    def max_memory_reserved(self, number: int) -> int:
        return 2 * self.peak

    def reset_peak_memory_stats(self, number: int) -> None:
        self.peak = 0


def torch_with(monkeypatch: pytest.MonkeyPatch, allocator: FakeAllocator) -> None:
    fake: Any = SimpleNamespace(cuda=allocator)
    monkeypatch.setitem(sys.modules, "torch", fake)


def test_the_allocators_peaks_are_told_by_phase_and_the_largest_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allocator = FakeAllocator()
    torch_with(monkeypatch, allocator)
    sampler = watching(monkeypatch, FakeCard("GPU-a"))
    for name, peak in (("load", 4 * GB), ("prefill", 1 * GB)):
        allocator.peak = peak
        sampler.phase(name)
    told = sampler.finish()
    assert told["phases"]["prefill"]["allocator_peak_bytes"] == GB
    assert told["allocator_peak_bytes"] == 4 * GB
    assert told["allocator_reserved_peak_bytes"] == 8 * GB
    assert told["allocator_reason"] is None


def test_a_process_that_does_not_use_the_card_through_pytorch_has_no_allocator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch_with(monkeypatch, FakeAllocator(begun=False))
    told = watching(monkeypatch, FakeCard("GPU-a")).finish()
    assert told["allocator_peak_bytes"] is None
    assert told["allocator_reason"] == vram.NO_ALLOCATOR
