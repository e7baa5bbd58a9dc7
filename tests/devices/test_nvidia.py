"""NVIDIA cards through a fake NVML: which are seen, what is told, what is not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from shortstack.devices import nvidia

from .fake_nvml import FakeCard, NoPermission, NotSupported, plug_in, process

A, B, C = "GPU-aaaa-1", "GPU-bbbb-2", "GPU-bbcc-3"


def three(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, *(FakeCard(uuid, f"card {uuid}") for uuid in (A, B, C)))


def uuids() -> list[str]:
    return [card.handle.uuid for card in nvidia.cards()]


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        (None, [A, B, C]),
        ("", []),
        ("-1", []),
        ("2,0", [C, A]),
        ("1,7,0", [B]),
        ("0, 1", [A, B]),
        ("GPU-aaaa,GPU-bbcc", [A, C]),
        ("GPU-bb", []),
        ("GPU-zz,0", []),
        ("none", []),
    ],
)
def test_cards_are_numbered_as_cuda_sees_them(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, seen: list[str]
) -> None:
    three(monkeypatch)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert uuids() == seen
    assert [card.id for card in nvidia.cards()] == [f"cuda:{n}" for n in range(len(seen))]


def test_a_part_of_a_card_is_seen_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, FakeCard("MIG-part-1"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-part-1,MIG-other")
    assert uuids() == ["MIG-part-1"]


@pytest.mark.parametrize(
    ("driver", "words"),
    [(True, "driver is here.*Run: pip install nvidia-ml-py"), (False, "no NVIDIA driver is seen")],
)
def test_without_the_package_the_reason_says_whether_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: bool, words: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nvidia, "DRIVER", tmp_path if driver else tmp_path / "none")
    with pytest.raises(nvidia.NoAnswerError, match=words):
        nvidia.cards()


def test_without_a_driver_the_reason_is_nvmls(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, driver=False)
    with pytest.raises(nvidia.NoAnswerError, match="NVML Shared Library Not Found"):
        nvidia.cards()


def test_a_card_that_is_not_here_is_named_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    three(monkeypatch)
    with pytest.raises(nvidia.NoAnswerError, match="cuda:3 is not here.*cuda:0, cuda:1, cuda:2"):
        nvidia.card("cuda:3")


def test_a_card_is_described_in_our_units_and_its_uuid_hashed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plug_in(monkeypatch, FakeCard(A))
    facts = nvidia.describe(nvidia.card("cuda:0"))
    assert facts == {
        "id": "cuda:0",
        "kind": "cuda",
        "name": "NVIDIA Fake 80GB",
        "uuid_sha256": facts["uuid_sha256"],
        "vram_bytes": 80_000_000_000,
        "driver": "580.65.06",
        "cuda": "13.0",
        "compute_capability": "9.0",
        "vbios": "96.00.00.00.01",
        "power_limit_w": 500.0,
        "power_limit_default_w": 700.0,
        "application_clocks_mhz": {"sm": 1980, "memory": 1980},
        "max_clocks_mhz": {"sm": 1990, "memory": 1990},
        "pcie_generation_max": 5,
        "pcie_width_max": 16,
        "mig": False,
        "ecc": True,
        "persistence": True,
    }
    assert len(facts["uuid_sha256"]) == 16
    assert A not in json.dumps(facts)


def test_what_a_card_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    names = FakeCard("").answers()
    mute = FakeCard(A, says=dict.fromkeys(names, NotSupported) | {"nvmlDeviceGetName": b"Old"})
    plug_in(monkeypatch, mute)
    facts = nvidia.describe(nvidia.card("cuda:0"))
    told = {key for key, value in facts.items() if value is not None}
    assert told == {
        *("id", "kind", "name", "driver", "cuda", "application_clocks_mhz", "max_clocks_mhz")
    }
    assert facts["name"] == "Old"
    assert facts["application_clocks_mhz"] == {"sm": None, "memory": None}


def test_a_function_that_an_old_package_lacks_is_told_when_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plug_in(monkeypatch, FakeCard(A))
    card = nvidia.card("cuda:0")
    del card.lib.nvmlDeviceGetTotalEnergyConsumption
    assert card.ask("nvmlDeviceGetTotalEnergyConsumption") is None
    with pytest.raises(nvidia.NoAnswerError, match="has no nvmlDeviceGetTotalEnergyConsumption"):
        card.energy_mj()


def test_a_missing_permission_is_told_in_nvmls_words(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, FakeCard(A, says={"nvmlDeviceGetTotalEnergyConsumption": NoPermission}))
    with pytest.raises(nvidia.NoAnswerError, match="Insufficient Permissions"):
        nvidia.card("cuda:0").energy_mj()


def test_a_card_that_goes_away_is_another_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCard(A)
    plug_in(monkeypatch, fake)
    card = nvidia.card("cuda:0")
    fake.lost = True
    with pytest.raises(nvidia.CardGoneError, match="cuda:0 went away: NVML says GPU is lost"):
        card.ask("nvmlDeviceGetPowerUsage")


def test_a_process_that_computes_and_draws_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    both, hidden = process(7, 500), process(8, None)
    plug_in(monkeypatch, FakeCard(A, compute=[both, hidden], graphics=[both, process(9, 40)]))
    assert nvidia.card("cuda:0").processes() == {7: 500, 8: None, 9: 40}


def test_slowdowns_are_words_also_from_old_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCard(A, says={"nvmlDeviceGetCurrentClocksEventReasons": 0x4 | 0x40})
    plug_in(monkeypatch, fake)
    card = nvidia.card("cuda:0")
    assert nvidia.slowdowns(card) == ["software power cap", "hardware thermal slowdown"]
    fake.says["nvmlDeviceGetCurrentClocksEventReasons"] = NotSupported
    assert nvidia.slowdowns(card) is None
    card.lib.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 0x20
    assert nvidia.slowdowns(card) == ["software thermal slowdown"]


def test_the_names_exist_in_the_real_package() -> None:
    """The fake cannot tell a misspelt function: the real module, where installed, can."""
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    missing = [name for name in FakeCard("").answers() if not hasattr(pynvml, name)]
    assert missing == []
    for name in ("GpuIsLost", "ResetRequired", "DriverNotLoaded", "Unknown", "Uninitialized"):
        assert issubclass(getattr(pynvml, f"NVMLError_{name}"), pynvml.NVMLError)
    assert (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM) == (
        nvidia.CLOCK_SM,
        nvidia.CLOCK_MEMORY,
    )
    reasons = {v for k, v in vars(pynvml).items() if k.startswith("nvmlClocksEventReason") and v}
    assert reasons - {pynvml.nvmlClocksEventReasonAll} == set(nvidia.SLOWDOWNS)
    assert nvidia.POLICIES["power"] == pynvml.NVML_PERF_POLICY_POWER
    assert nvidia.POLICIES["thermal"] == pynvml.NVML_PERF_POLICY_THERMAL
    assert nvidia.POLICIES["reliability"] == pynvml.NVML_PERF_POLICY_RELIABILITY
