"""Memory of a card while a model loads and runs: the whole card, this process, its allocator.

The three differ: an allocator counts its own blocks, the process adds the driver's context and
libraries, the card adds everybody else. So the card is told over what it held before we came.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

from shortstack.devices import nvidia
from shortstack.devices.host import memory_limit_bytes

INTERVAL_S = 0.02
METHOD = (
    "device and process: NVML (nvmlDeviceGetMemoryInfo, running processes), sampled every "
    f"{1000 * INTERVAL_S:g} ms by a thread; allocator: torch.cuda peaks, exact"
)
NOT_LISTED = "the driver lists no memory for this process id: a container hides it"
WDDM = "the driver does not tell memory by process (Windows display driver model)"
NO_ALLOCATOR = "no PyTorch on this card in this process"


def watch(device_id: str) -> tuple[Sampler | None, str | None]:
    """A running sampler of a card; or None and the reason. Begin before the model is loaded."""
    if not device_id.startswith("cuda:"):
        return None, f"{device_id} has no memory of its own that this tool reads"
    try:
        return Sampler(nvidia.card(device_id)), None
    except nvidia.NoAnswerError as error:
        return None, str(error)


def free_bytes(device_id: str) -> int | None:
    """Memory that a model could take on a device now: RAM for the CPU; None where it is not told.

    Of RAM, what the system could free without swapping (psutil's `available`), and not more than a
    container may use in all.
    """
    if device_id == "cpu":
        import psutil

        available = int(psutil.virtual_memory().available)
        return min(available, memory_limit_bytes() or available)
    if not device_id.startswith("cuda:"):
        return None
    try:
        return nvidia.card(device_id).memory_free_bytes()
    except nvidia.NoAnswerError:
        return None


class Sampler:
    """Watches a card from a thread; `phase` closes one phase and says what it took.

    Its making reads the idle baseline. Raises NoAnswerError if the card does not tell its memory.
    A card that goes away later ends the samples: `lost` in the record says so.
    """

    def __init__(self, card: nvidia.Card) -> None:
        self._card = card
        self._baseline = self._last = self._high = self._phase_high = card.memory_used_bytes()
        self._process: int | None = None
        self._process_reason: str | None = NOT_LISTED
        self._allocator: dict[str, int] = {}
        self._phases: dict[str, dict[str, int | None]] = {}
        self._lost: str | None = None
        self._samples = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def phase(self, name: str) -> None:
        """End the phase `name`: bytes of the card at its peak and at its end."""
        self._take()
        peaks = allocator_peaks(self._card.number)
        with self._lock:
            for key, value in peaks.items():
                self._allocator[key] = max(value, self._allocator.get(key, 0))
            self._phases[name] = {
                "peak_device_bytes": self._phase_high,
                "end_device_bytes": self._last,
                "allocator_peak_bytes": peaks.get("allocated"),
            }
            self._phase_high = self._last

    def finish(self) -> dict[str, Any]:
        """Stop the thread; everything seen, as `device_memory` of the record."""
        self._stop.set()
        self._thread.join()
        self._take()
        for key, value in allocator_peaks(self._card.number).items():
            self._allocator[key] = max(value, self._allocator.get(key, 0))
        return {
            "method": METHOD,
            "n_samples": self._samples,
            "baseline_bytes": self._baseline,
            "peak_device_bytes": self._high,
            "delta_bytes": self._high - self._baseline,
            "process_bytes": self._process,
            "process_reason": None if self._process is not None else self._process_reason,
            "allocator_peak_bytes": self._allocator.get("allocated"),
            "allocator_reserved_peak_bytes": self._allocator.get("reserved"),
            "allocator_reason": None if self._allocator else NO_ALLOCATOR,
            "phases": self._phases,
            "lost": self._lost,
        }

    def _watch(self) -> None:
        while self._lost is None and not self._stop.wait(INTERVAL_S):
            self._take()

    def _take(self) -> None:
        with self._lock:
            if self._lost is not None:
                return
            try:
                now, listed = self._card.memory_used_bytes(), self._card.processes()
            except nvidia.NoAnswerError as error:
                self._lost = str(error)
                return
            self._samples += 1
            self._last = now
            self._high, self._phase_high = max(self._high, now), max(self._phase_high, now)
            if listed is not None and os.getpid() in listed:
                mine = listed[os.getpid()]
                self._process_reason = WDDM
                if mine is not None:
                    self._process = max(mine, self._process or 0)


def allocator_peaks(number: int) -> dict[str, int]:
    """Peaks of PyTorch's allocator on card `number` since the last call, in bytes; starts anew.

    `allocated` by tensors, `reserved` from the driver. Empty where this process has not begun to
    use the card through PyTorch; never imports it.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    peaks = {
        "allocated": int(torch.cuda.max_memory_allocated(number)),
        "reserved": int(torch.cuda.max_memory_reserved(number)),
    }
    torch.cuda.reset_peak_memory_stats(number)
    return peaks
