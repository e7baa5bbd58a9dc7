"""The list of devices: ours, llama.cpp's, both as one; reasons where there is none."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from shortstack import child, llama_devices
from shortstack.devices import host, listing
from shortstack.errors import ShortstackError

from .fake_nvml import FakeCard, plug_in

VULKAN = {"name": "Vulkan0", "description": "Radeon 780M", "type": 2, "total_bytes": 8_000_000_000}
CUDA = {"name": "CUDA0", "description": "NVIDIA Fake 80GB", "type": 1, "total_bytes": 80_000_000}
CPU = {"name": "CPU", "description": "A CPU", "type": 0, "total_bytes": 1}
BLAS = {"name": "BLAS", "description": "OpenBLAS", "type": 3, "total_bytes": 0}


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    listing.survey.cache_clear()
    yield
    listing.survey.cache_clear()


def llama_lists(monkeypatch: pytest.MonkeyPatch, *told: dict[str, object]) -> None:
    monkeypatch.setattr(child, "call", lambda *_, **__: {"devices": list(told)})


def test_the_processor_comes_first_and_cards_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, FakeCard("GPU-a"), FakeCard("GPU-b"))
    assert [one["id"] for one in listing.devices()] == ["cpu", "cuda:0", "cuda:1"]
    assert all({"id", "kind", "name"} <= set(one) for one in listing.devices())
    assert [one["id"] for one in host.describe()["devices"]] == ["cpu", "cuda:0", "cuda:1"]


def test_a_divided_card_says_that_cuda_sees_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, FakeCard("GPU-a", says={"nvmlDeviceGetMigMode": (1, 1)}))
    assert "MIG is on" in listing.devices()[1]["note"]


def test_no_driver_leaves_the_processor_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, driver=False)
    llama_lists(monkeypatch, CPU, BLAS)
    assert [one["id"] for one in listing.survey()["devices"]] == ["cpu"]
    assert "no NVIDIA driver" in listing.survey()["missing"]["cuda"]
    assert "CPU alone" in listing.survey()["missing"]["llama.cpp"]


def test_hidden_cards_have_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, FakeCard("GPU-a"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES" in (listing.nvidia_cards()[1] or "")


def test_llama_cpps_devices_join_and_a_card_on_both_lists_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plug_in(monkeypatch, FakeCard("GPU-a"))
    llama_lists(monkeypatch, CUDA, VULKAN, CPU)
    cpu, card, vulkan = listing.survey()["devices"]
    assert cpu["id"] == "cpu"
    assert (card["id"], card["llama_cpp"], card["vram_bytes"]) == ("cuda:0", "CUDA0", 8e10)
    assert vulkan == {
        "id": "vulkan:0",
        "kind": "vulkan",
        "name": "Radeon 780M",
        "vram_bytes": 8_000_000_000,
        "llama_cpp": "Vulkan0",
    }
    assert listing.device("vulkan:0") == vulkan
    assert listing.survey()["missing"] == {}


def test_a_device_that_is_not_here_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plug_in(monkeypatch, driver=False)
    llama_lists(monkeypatch)
    with pytest.raises(ShortstackError, match="'cuda:0' is not here: no NVIDIA driver"):
        listing.device("cuda:0")
    with pytest.raises(ShortstackError, match="unknown device 'gpu'.*Known: cpu"):
        listing.device("gpu")


@pytest.mark.parametrize(
    ("name", "identity"),
    [
        ("CUDA1", "cuda:1"),
        ("Metal", "metal:0"),
        ("MTL0", "metal:0"),
        ("Vulkan12", "vulkan:12"),
        ("ROCm0", "rocm:0"),
        ("GPUOpenCL", "opencl:0"),
    ],
)
def test_llama_cpps_names_become_our_ids(name: str, identity: str) -> None:
    assert llama_devices.device_id(name) == identity


def test_a_llama_cpp_that_crashes_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object, **__: object) -> None:
        raise ShortstackError("llama.cpp died of signal SIGSEGV.")

    monkeypatch.setattr(child, "call", dies)
    assert llama_devices.devices() == ([], "llama.cpp died of signal SIGSEGV.")


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
def test_the_installed_llama_cpp_lists_the_processor() -> None:
    told = child.call("shortstack.llama_devices:backend_list", {}, timeout_s=60, what="llama.cpp")[
        "devices"
    ]
    (cpu,) = [one for one in told if one["type"] == llama_devices.CPU]
    assert cpu["name"] == "CPU"
    assert cpu["description"]
    assert cpu["total_bytes"] > 100_000_000
