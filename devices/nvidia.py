"""NVIDIA's management library (NVML). Only this file imports pynvml and knows its names.

Functions and units: NVML API reference, "Device Queries"; module `pynvml` of nvidia-ml-py.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.errors import ShortstackError

INSTALL = "pip install nvidia-ml-py"
DRIVER = Path("/proc/driver/nvidia/version")
NO_DRIVER = f"no NVIDIA driver is seen, nor the package that would ask it. With one: {INSTALL}"
NO_PACKAGE = f"an NVIDIA driver is here, the package that asks it is not. Run: {INSTALL}"
ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""Environment in which CUDA numbers cards as NVML does; without it the fastest comes first."""

CLOCK_SM, CLOCK_MEMORY = 1, 2
TEMPERATURE_GPU = 0
POLICIES = {"power": 0, "thermal": 1, "sync boost": 2, "board limit": 3, "reliability": 5}
"""nvmlPerfPolicyType_t: NVML counts for how long each has held the clocks back."""

SLOWDOWNS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}
"""nvmlClocksEventReasons, formerly throttle reasons, in words."""

GONE = {
    *("NVMLError_GpuIsLost", "NVMLError_ResetRequired", "NVMLError_DriverNotLoaded"),
    *("NVMLError_Unknown", "NVMLError_Uninitialized"),
}
"""What NVML raises for a card that answered before and is no longer there."""


class NoAnswerError(ShortstackError):
    """There is no library, no driver, no such card, or the card does not tell this figure."""


class CardGoneError(NoAnswerError):
    """The card answered before and is gone: off the bus, reset, or its driver unloaded."""


@dataclass(frozen=True)
class Card:
    """One card as CUDA sees it: `number` is N of `cuda:N`, `handle` is NVML's."""

    number: int
    lib: Any
    handle: Any

    @property
    def id(self) -> str:
        return f"cuda:{self.number}"

    def need(self, function: str, *arguments: Any) -> Any:
        """The answer of an `nvmlDevice...` function. Raises NoAnswerError, CardGoneError."""
        asked = getattr(self.lib, function, None)
        if asked is None:
            raise NoAnswerError(
                f"{self.id}: this nvidia-ml-py has no {function}. Run: {INSTALL} -U"
            )
        try:
            return asked(self.handle, *arguments)
        except self.lib.NVMLError as error:
            if type(error).__name__ in GONE:
                raise CardGoneError(f"{self.id} went away: NVML says {error}.") from None
            raise NoAnswerError(f"{self.id}: {function} says {error}.") from None

    def ask(self, function: str, *arguments: Any) -> Any:
        """The answer; None where the card or our permissions give none. Raises CardGoneError."""
        try:
            return self.need(function, *arguments)
        except CardGoneError:
            raise
        except NoAnswerError:
            return None

    def memory_used_bytes(self) -> int:
        """Memory in use on the whole card, by whoever. Raises NoAnswerError."""
        return int(self.need("nvmlDeviceGetMemoryInfo").used)

    def memory_free_bytes(self) -> int:
        """Memory that nobody uses on the whole card. Raises NoAnswerError."""
        return int(self.need("nvmlDeviceGetMemoryInfo").free)

    def energy_mj(self) -> int:
        """Millijoules since the driver was loaded (Volta and later). Raises NoAnswerError."""
        return int(self.need("nvmlDeviceGetTotalEnergyConsumption"))

    def processes(self) -> dict[int, int | None] | None:
        """Bytes by process id, None where the driver hides them; None: it lists no processes.

        A process that both computes and draws is listed twice with the same bytes: counted once.
        """
        found: dict[int, int | None] = {}
        told = False
        for kind in ("Compute", "Graphics"):
            listed = self.ask(f"nvmlDeviceGet{kind}RunningProcesses")
            told = told or listed is not None
            for process in listed or ():
                sizes = (found.get(process.pid), process.usedGpuMemory)
                found[process.pid] = max((s for s in sizes if s is not None), default=None)
        return found if told else None


def driver_seen() -> bool:
    """Whether an NVIDIA driver seems to be installed; asks no library."""
    return DRIVER.exists() or shutil.which("nvidia-smi") is not None


def library() -> Any:
    """pynvml, initialised (again is free). Raises NoAnswerError with the reason and what to do."""
    try:
        import pynvml
    except ImportError:
        raise NoAnswerError(NO_PACKAGE if driver_seen() else NO_DRIVER) from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NoAnswerError(f"no NVIDIA driver answers: NVML says {error}.") from None
    return pynvml


def cards() -> list[Card]:
    """The cards that CUDA would see, as it numbers them under `ORDER`. Raises NoAnswerError.

    Follows CUDA_VISIBLE_DEVICES: numbers, beginnings of UUIDs, MIG UUIDs; what comes after the
    first that names no card is not seen (CUDA C++ Programming Guide, "CUDA Environment Variables").
    """
    lib = library()
    return [Card(number, lib, handle) for number, handle in enumerate(_handles(lib))]


def card(device_id: str) -> Card:
    """The card of `cuda:N`. Raises NoAnswerError."""
    found = {one.id: one for one in cards()}
    if device_id not in found:
        known = ", ".join(found) or "none"
        raise NoAnswerError(f"{device_id} is not here. NVIDIA cards that are: {known}.")
    return found[device_id]


def slowdowns(one: Card) -> list[str] | None:
    """What holds the clocks back now, in words; None where the card does not tell."""
    mask = one.ask("nvmlDeviceGetCurrentClocksEventReasons")
    if mask is None:  # drivers before 535
        mask = one.ask("nvmlDeviceGetCurrentClocksThrottleReasons")
    return None if mask is None else [word for bit, word in SLOWDOWNS.items() if mask & bit]


def held_back_s(one: Card) -> dict[str, float]:
    """Seconds since the driver was loaded in which each policy held the clocks back."""
    status = {name: one.ask("nvmlDeviceGetViolationStatus", n) for name, n in POLICIES.items()}
    return {name: told.violationTime / 1e9 for name, told in status.items() if told is not None}


def temperature_c(one: Card) -> int | None:
    told = one.ask("nvmlDeviceGetTemperatureV", TEMPERATURE_GPU)
    if told is None:  # drivers before 565
        told = one.ask("nvmlDeviceGetTemperature", TEMPERATURE_GPU)
    return None if told is None else int(told)


def watts(one: Card, function: str) -> float | None:
    """NVML tells power in milliwatts."""
    told = one.ask(function)
    return None if told is None else told / 1000


def describe(one: Card) -> dict[str, Any]:
    """What does not change during a run; what the card does not tell is None.

    Raises CardGoneError. The UUID is hashed: it names one card in the world.
    """
    sm, memory = (one.ask("nvmlDeviceGetApplicationsClock", c) for c in (CLOCK_SM, CLOCK_MEMORY))
    top_sm, top_memory = (one.ask("nvmlDeviceGetMaxClockInfo", c) for c in (CLOCK_SM, CLOCK_MEMORY))
    info = one.ask("nvmlDeviceGetMemoryInfo")
    capability = one.ask("nvmlDeviceGetCudaComputeCapability")
    return {
        "id": one.id,
        "kind": "cuda",
        "name": _text(one.ask("nvmlDeviceGetName")),
        "uuid_sha256": _hashed(_text(one.ask("nvmlDeviceGetUUID"))),
        "vram_bytes": None if info is None else int(info.total),
        "driver": _system(one.lib, "nvmlSystemGetDriverVersion"),
        "cuda": _cuda(_system(one.lib, "nvmlSystemGetCudaDriverVersion_v2")),
        "compute_capability": None if capability is None else "{}.{}".format(*capability),
        "vbios": _text(one.ask("nvmlDeviceGetVbiosVersion")),
        "power_limit_w": watts(one, "nvmlDeviceGetPowerManagementLimit"),
        "power_limit_default_w": watts(one, "nvmlDeviceGetPowerManagementDefaultLimit"),
        "application_clocks_mhz": {"sm": sm, "memory": memory},
        "max_clocks_mhz": {"sm": top_sm, "memory": top_memory},
        "pcie_generation_max": one.ask("nvmlDeviceGetMaxPcieLinkGeneration"),
        "pcie_width_max": one.ask("nvmlDeviceGetMaxPcieLinkWidth"),
        "mig": _enabled(one.ask("nvmlDeviceGetMigMode")),
        "ecc": _enabled(one.ask("nvmlDeviceGetEccMode")),
        "persistence": _enabled(one.ask("nvmlDeviceGetPersistenceMode")),
    }


def _handles(lib: Any) -> Iterator[Any]:
    count = lib.nvmlDeviceGetCount()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(count)) if visible is None else visible.split(",")
    for name in names:
        handle = _named(lib, name.strip(), count)
        if handle is None:
            return
        yield handle


def _named(lib: Any, name: str, count: int) -> Any:
    try:
        if name.isdecimal():
            return lib.nvmlDeviceGetHandleByIndex(int(name)) if int(name) < count else None
        if name.startswith("MIG-"):
            return lib.nvmlDeviceGetHandleByUUID(name)
        if name.startswith("GPU-"):
            every = [lib.nvmlDeviceGetHandleByIndex(n) for n in range(count)]
            fit = [h for h in every if _text(lib.nvmlDeviceGetUUID(h)).startswith(name)]  # type: ignore[union-attr]  # a card has a UUID
            return fit[0] if len(fit) == 1 else None
    except lib.NVMLError:
        return None
    return None


def _system(lib: Any, function: str) -> Any:
    try:
        answer = getattr(lib, function)()
    except (AttributeError, lib.NVMLError):
        return None
    return _text(answer) if isinstance(answer, bytes) else answer


def _text(told: str | bytes | None) -> str | None:
    """nvidia-ml-py before 11.5 answers in bytes."""
    return told.decode() if isinstance(told, bytes) else told


def _hashed(uuid: str | None) -> str | None:
    return None if uuid is None else hashlib.sha256(uuid.encode()).hexdigest()[:16]


def _cuda(version: int | None) -> str | None:
    """13000 is 13.0: 1000 x major + 10 x minor."""
    return None if version is None else f"{version // 1000}.{version % 1000 // 10}"


def _enabled(told: Any) -> bool | None:
    """MIG and ECC answer [now, after the next reset]."""
    if told is None:
        return None
    return bool(told[0] if isinstance(told, list | tuple) else told)
