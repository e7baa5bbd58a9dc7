"""Energy from counters that the hardware keeps, over windows long enough for their steps.

NVIDIA: the card's total since its driver was loaded. Intel and AMD on Linux: RAPL, by package. A
sampled power is never summed up: some cards look at their power a quarter of the time only (Yang
and others, "Part-time Power Measurements", arXiv 2312.02741).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from shortstack.devices import nvidia
from shortstack.errors import ShortstackError

Phase = Literal["prefill", "decode"]
WINDOW_S = 10.0
"""Counters step about every 0.1 s: two ends off by one step are 2 % of this window."""

POWERCAP = Path("/sys/class/powercap")
MOST_W = 1000.0
"""No package draws more: a RAPL counter cannot come round twice in its range over this."""

ALLOW = "To allow it until the next start: sudo chmod a+r {zone}*/energy_uj"


class CounterLostError(ShortstackError):
    """A counter that could be read cannot any more, or has gone back."""


class Counter(Protocol):
    """Joules by difference of two readings. A reading raises CounterLostError."""

    @property
    def method(self) -> str: ...

    @property
    def scope(self) -> str: ...

    @property
    def longest_s(self) -> float:
        """The longest time between two readings whose difference is certain."""
        ...

    def read(self) -> tuple[int, ...]: ...

    def joules(self, start: tuple[int, ...], end: tuple[int, ...]) -> float: ...


@dataclass(frozen=True)
class NvmlCounter:
    """The whole card: its memory and fans too, whoever uses it. Counts millijoules."""

    card: nvidia.Card
    method: str = "nvmlDeviceGetTotalEnergyConsumption"
    scope: str = "gpu"
    longest_s: float = float("inf")

    def read(self) -> tuple[int, ...]:
        try:
            return (self.card.energy_mj(),)
        except nvidia.NoAnswerError as error:
            raise CounterLostError(str(error)) from None

    def joules(self, start: tuple[int, ...], end: tuple[int, ...]) -> float:
        if end[0] < start[0]:
            raise CounterLostError(f"{self.card.id}: its energy counter went back: driver reloaded")
        return (end[0] - start[0]) / 1000


@dataclass(frozen=True)
class RaplCounter:
    """Processor packages, added up; memory modules are not in it. Counts microjoules, comes round.

    Linux kernel, "Power Capping Framework": energy_uj, max_energy_range_uj.
    """

    zones: tuple[Path, ...]
    ranges_uj: tuple[int, ...]
    method: str = "RAPL energy_uj (powercap)"
    scope: str = "cpu package"

    @property
    def longest_s(self) -> float:
        return min(self.ranges_uj) / 1e6 / MOST_W

    def read(self) -> tuple[int, ...]:
        try:
            return tuple(_number(zone / "energy_uj") for zone in self.zones)
        except (OSError, ValueError) as error:
            words = error.strerror if isinstance(error, OSError) else str(error)
            raise CounterLostError(f"RAPL cannot be read any more: {words}") from None

    def joules(self, start: tuple[int, ...], end: tuple[int, ...]) -> float:
        steps = zip(start, end, self.ranges_uj, strict=True)
        return sum(b - a if b >= a else b - a + limit for a, b, limit in steps) / 1e6


def counters(device_id: str) -> tuple[list[Counter], list[str]]:
    """The counters to read around work on a device, its own first; and why others are not there.

    Work on a card keeps the processor busy too, so both are read. Each is tried once here.
    """
    tries: list[Callable[[], Counter]] = [rapl]
    reasons = []
    if device_id.startswith("cuda:"):
        tries.insert(0, lambda: NvmlCounter(nvidia.card(device_id)))
    elif device_id != "cpu":
        reasons.append(f"{device_id}: no energy counter that this tool reads")
    found = []
    for make in tries:
        try:
            counter = make()
            counter.read()
            found.append(counter)
        except ShortstackError as error:
            reasons.append(str(error))
    return found, reasons


def rapl(root: Path | None = None) -> RaplCounter:
    """The packages' counter. Raises NoAnswerError with the reason and the command that helps."""
    if sys.platform != "linux":
        raise nvidia.NoAnswerError("cpu package: this system lets no program read RAPL counters")
    root = root or POWERCAP
    zones = [zone for zone in sorted(root.glob("intel-rapl:*")) if _is_package(zone)]
    if not zones:
        raise nvidia.NoAnswerError(
            "cpu package: this machine shows no RAPL counters (virtual machines hide them; "
            "else try: sudo modprobe intel_rapl_msr)"
        )
    try:
        ranges = tuple(_number(zone / "max_energy_range_uj") for zone in zones)
        counter = RaplCounter(tuple(zones), ranges)
        for zone in zones:
            _number(zone / "energy_uj")
    except PermissionError:
        advice = ALLOW.format(zone=root / "intel-rapl:")
        raise nvidia.NoAnswerError(f"cpu package: only root may read RAPL. {advice}") from None
    except (OSError, ValueError) as error:
        raise nvidia.NoAnswerError(f"cpu package: RAPL does not answer: {error}") from None
    return counter


class Meter:
    """Counters and what an idle device draws by them."""

    def __init__(
        self,
        counters: Sequence[Counter],
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.counters = tuple(counters)
        self._clock, self._sleep = clock, sleep
        self._idle: dict[str, dict[str, float]] = {}

    def idle(self, window_s: float = WINDOW_S) -> None:
        """Watch the idle device for `window_s`, by the counters that measure the work later.

        Idle as the work finds it: with the model loaded and nothing asked of it. Raises
        CounterLostError.
        """
        start, begin = self._read()
        self._sleep(window_s)
        for counter, told in self._entries(start, begin):
            watts = told["gross_j"] / told["window_s"]
            self._idle[counter.scope] = {"idle_w": watts, "idle_window_s": told["window_s"]}

    def measure(
        self, work: Callable[[], int], phase: Phase, window_s: float = WINDOW_S
    ) -> list[dict[str, Any]]:
        """Repeat `work`, which returns the tokens it ran, for at least `window_s`; an entry each.

        `net_j` is gross less idle power times the window, not clamped: noise may make it negative.
        None without an idle window. Raises CounterLostError.
        """
        start, begin = self._read()
        tokens = work()
        while self._clock() - begin < window_s:
            tokens += work()
        return [
            self._record(counter, told, tokens, phase)
            for counter, told in self._entries(start, begin)
        ]

    def _read(self) -> tuple[list[tuple[int, ...]], float]:
        readings = [counter.read() for counter in self.counters]
        return readings, self._clock()

    def _entries(
        self, start: Sequence[tuple[int, ...]], begin: float
    ) -> list[tuple[Counter, dict[str, float]]]:
        end, stop = self._read()
        window_s = stop - begin
        told = []
        for counter, a, b in zip(self.counters, start, end, strict=True):
            if window_s > counter.longest_s:
                raise CounterLostError(
                    f"{counter.scope}: {window_s:.0f} s is longer than the {counter.longest_s:.0f} "
                    "s in which its counter may come round. Run fewer tokens a turn."
                )
            told.append((counter, {"window_s": window_s, "gross_j": counter.joules(a, b)}))
        return told

    def _record(
        self, counter: Counter, told: Mapping[str, float], tokens: int, phase: Phase
    ) -> dict[str, Any]:
        idle: Mapping[str, float | None] = self._idle.get(
            counter.scope, {"idle_w": None, "idle_window_s": None}
        )
        watts = idle["idle_w"]
        return {
            "method": counter.method,
            "scope": counter.scope,
            "phase": phase,
            "tokens": tokens,
            **told,
            **idle,
            "net_j": None if watts is None else told["gross_j"] - watts * told["window_s"],
        }


def measured(
    device_id: str,
    works: Mapping[Phase, Callable[[], int]],
    *,
    window_s: float = WINDOW_S,
    idle_s: float = WINDOW_S,
) -> dict[str, Any]:
    """`energy` and `energy_reason` of a record: idle first, then each work in its own window.

    Call it with the model loaded. Counters never raise here: entries taken before a device went
    away are kept, and `energy_reason` (None if all went well) says what is missing.
    """
    found, reasons = counters(device_id)
    entries: list[dict[str, Any]] = []
    if found:
        meter = Meter(found)
        try:
            meter.idle(idle_s)
            for phase, work in works.items():
                entries += meter.measure(work, phase, window_s)
        except CounterLostError as error:
            reasons.append(str(error))
    return {"energy": entries, "energy_reason": "; ".join(reasons) or None}


def flags(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Windows, also idle ones, too short for the steps of their counters."""
    found: dict[str, None] = {}
    for entry in entries:
        for name, key in ((entry["phase"], "window_s"), ("idle", "idle_window_s")):
            seconds = entry.get(key)
            if seconds is not None and seconds < WINDOW_S:
                found[f"short window: {name} {seconds:.1f} s of {WINDOW_S:g} s for energy"] = None
    return list(found)


def _is_package(zone: Path) -> bool:
    """Packages alone: cores are part of them, `psys` is the whole platform."""
    try:
        return (zone / "name").read_text(encoding="ascii").startswith("package")
    except OSError:
        return False


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
