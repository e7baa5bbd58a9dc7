"""A pynvml whose cards, driver and permissions a test sets: the real one's names and units."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest


class NVMLError(Exception):
    pass


def _error(name: str, words: str) -> type[NVMLError]:
    return type(name, (NVMLError,), {"__str__": lambda self: words})


NotSupported = _error("NVMLError_NotSupported", "Not Supported")
NoPermission = _error("NVMLError_NoPermission", "Insufficient Permissions")
GpuIsLost = _error("NVMLError_GpuIsLost", "GPU is lost")
NotFound = _error("NVMLError_NotFound", "Not Found")
LibraryNotFound = _error("NVMLError_LibraryNotFound", "NVML Shared Library Not Found")
TOTAL_BYTES = 80_000_000_000


@dataclass
class FakeCard:
    """`says`: function -> answer, a list to pop answers from, or an error to raise."""

    uuid: str
    name: str = "NVIDIA Fake 80GB"
    says: dict[str, Any] = field(default_factory=dict)
    compute: list[SimpleNamespace] = field(default_factory=list)
    graphics: list[SimpleNamespace] = field(default_factory=list)
    used_bytes: int = 1_000_000_000
    lost: bool = False

    def answers(self) -> dict[str, Any]:
        return {
            "nvmlDeviceGetName": self.name,
            "nvmlDeviceGetUUID": self.uuid,
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(
                total=TOTAL_BYTES, used=self.used_bytes, free=TOTAL_BYTES - self.used_bytes
            ),
            "nvmlDeviceGetCudaComputeCapability": (9, 0),
            "nvmlDeviceGetVbiosVersion": "96.00.00.00.01",
            "nvmlDeviceGetPowerManagementLimit": 500_000,
            "nvmlDeviceGetPowerManagementDefaultLimit": 700_000,
            "nvmlDeviceGetApplicationsClock": 1980,
            "nvmlDeviceGetMaxClockInfo": 1990,
            "nvmlDeviceGetMaxPcieLinkGeneration": 5,
            "nvmlDeviceGetMaxPcieLinkWidth": 16,
            "nvmlDeviceGetCurrPcieLinkGeneration": 1,
            "nvmlDeviceGetCurrPcieLinkWidth": 16,
            "nvmlDeviceGetMigMode": [0, 1],
            "nvmlDeviceGetEccMode": [1, 1],
            "nvmlDeviceGetPersistenceMode": 1,
            "nvmlDeviceGetClockInfo": 1755,
            "nvmlDeviceGetTemperatureV": 41,
            "nvmlDeviceGetPowerUsage": 71_500,
            "nvmlDeviceGetCurrentClocksEventReasons": 0x1,
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=35, memory=10),
            "nvmlDeviceGetViolationStatus": SimpleNamespace(referenceTime=0, violationTime=0),
            "nvmlDeviceGetTotalEnergyConsumption": 5_000_000_000_000,
            "nvmlDeviceGetComputeRunningProcesses": self.compute,
            "nvmlDeviceGetGraphicsRunningProcesses": self.graphics,
        } | self.says

    def answer(self, function: str) -> Any:
        if self.lost:
            raise GpuIsLost()
        told = self.answers()[function]
        if function in self.says and isinstance(told, list):
            told = told.pop(0)
        if isinstance(told, type) and issubclass(told, NVMLError):
            raise told()
        return told


def process(pid: int, used_bytes: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=used_bytes)


def fake_pynvml(*cards: FakeCard, driver: bool = True) -> Any:
    """A module named pynvml with these cards in the order of their PCI addresses."""
    module: Any = types.ModuleType("pynvml")
    module.NVMLError = NVMLError
    for function in FakeCard("").answers():
        setattr(module, function, lambda card, *_, asked=function: card.answer(asked))

    def start() -> None:
        if not driver:
            raise LibraryNotFound()

    def by_uuid(uuid: str) -> FakeCard:
        for card in cards:
            if card.uuid == uuid:
                return card
        raise NotFound()

    def by_index(index: int) -> FakeCard:
        if cards[index].lost:
            raise GpuIsLost()
        return cards[index]

    module.nvmlInit = start
    module.nvmlDeviceGetCount = lambda: len(cards)
    module.nvmlDeviceGetHandleByIndex = by_index
    module.nvmlDeviceGetHandleByUUID = by_uuid
    module.nvmlSystemGetDriverVersion = lambda: "580.65.06"
    module.nvmlSystemGetCudaDriverVersion_v2 = lambda: 13000
    return module


def plug_in(monkeypatch: pytest.MonkeyPatch, *cards: FakeCard, driver: bool = True) -> None:
    """Put these cards into this machine, and take real ones and their environment out."""
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml(*cards, driver=driver))
