"""A real NVIDIA card against known answers. Skips, and says why, where there is none."""

from __future__ import annotations

import os
from typing import Any

import pytest

from shortstack import child
from shortstack.devices import conditions, energy, listing, nvidia, vram

GB = 1 << 30


@pytest.fixture
def card() -> nvidia.Card:
    try:
        found = nvidia.cards()
    except nvidia.NoAnswerError as error:
        pytest.skip(str(error))
    if not found:
        pytest.skip("no NVIDIA card is visible")
    return found[0]


def test_a_card_tells_what_it_is(card: nvidia.Card) -> None:
    facts = listing.device("cuda:0")
    assert facts["name"]
    assert facts["driver"]
    assert facts["vram_bytes"] > GB
    assert 0 < card.memory_used_bytes() < facts["vram_bytes"]


def test_a_card_tells_its_moment(card: nvidia.Card) -> None:
    now = conditions.snapshot("cuda:0")
    assert "reason" not in now
    assert 0 < now["temperature_c"] < 110
    assert now["sm_clock_mhz"] > 0
    assert 0 < now["power_w"] < 2000


def test_an_idle_card_draws_some_power_by_its_counter(card: nvidia.Card) -> None:
    found, reasons = energy.counters("cuda:0")
    mine = [counter for counter in found if counter.scope == "gpu"]
    if not mine:
        pytest.skip("; ".join(reasons))
    meter = energy.Meter(mine)
    meter.idle(2.0)
    (entry,) = meter.measure(lambda: 1, "decode", 0.0)
    assert 1 < entry["idle_w"] < 1000


def test_known_bytes_are_seen_three_ways(card: nvidia.Card) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no card")
    told = child.call("test_real_card:takes_a_gigabyte", {}, timeout_s=120, what="PyTorch")
    assert told["allocator_peak_bytes"] == pytest.approx(GB, rel=0.02)
    assert told["delta_bytes"] >= GB
    if told["process_bytes"] is None:
        assert told["process_reason"]
    else:
        assert told["process_bytes"] >= GB


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a child import this file."""
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__), prepend=os.pathsep)


def takes_a_gigabyte(request: dict[str, Any]) -> dict[str, Any]:
    """In a child: 1 GiB of float32 on the card, given back after the prefill phase."""
    import torch

    sampler, reason = vram.watch("cuda:0")
    assert sampler is not None, reason
    block = torch.ones(GB // 4, device="cuda:0")
    torch.cuda.synchronize()
    sampler.phase("load")
    del block
    sampler.phase("prefill")
    return sampler.finish()
