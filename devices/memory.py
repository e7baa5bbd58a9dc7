"""Resident memory of this process, anonymous and file-backed apart, by phase.

The kernel keeps a peak of the total only (VmHWM); the split is sampled by a thread. A native call
that releases the interpreter lock is seen while it runs. Timed trials never run this.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
INTERVAL_S = 0.005
LINUX_METHOD = (
    "total: the kernel's own peak (VmHWM), or a larger sample; anonymous and file-backed: RssAnon "
    f"and RssFile of /proc/self/status, sampled every {1000 * INTERVAL_S:g} ms by a thread"
)
SAMPLED = f"psutil rss, sampled every {1000 * INTERVAL_S:g} ms by a thread"
METHODS = {
    "linux": LINUX_METHOD,
    "darwin": f"total: the kernel's own peak (getrusage ru_maxrss), or a larger sample; {SAMPLED}",
    "win32": f"total: the kernel's own peak (PeakWorkingSetSize), or a larger sample; {SAMPLED}",
}
"""By sys.platform; elsewhere the kernel keeps no peak that we know of."""

NO_SPLIT = "this system does not tell anonymous from file-backed resident memory"


@dataclass(frozen=True)
class Usage:
    """Resident bytes at one moment. None: this system does not tell."""

    total_bytes: int
    anon_bytes: int | None
    file_bytes: int | None

    def to_dict(self) -> dict[str, int | None]:
        return dict(vars(self))


def usage() -> Usage:
    """Read once, now."""
    if sys.platform == "linux":
        fields = _status()
        return Usage(fields["VmRSS"], fields["RssAnon"], fields["RssFile"])
    import psutil

    return Usage(psutil.Process().memory_info().rss, None, None)


def kernel_peak_bytes() -> int | None:
    """The kernel's own peak of the total since this process began; None where it keeps none."""
    if sys.platform == "linux":
        return _status()["VmHWM"]
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes there, kB elsewhere
    import psutil

    peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
    return None if peak is None else int(peak)


class Sampler:
    """Watches from a thread; `phase` closes one phase and says what it took."""

    def __init__(self) -> None:
        self.baseline = self._last = self._top = usage()
        self._high = self._phase_high = self.baseline
        self._phases: dict[str, dict[str, Any]] = {}
        self._samples = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def phase(self, name: str) -> None:
        """End the phase `name`: its peaks, and what is resident at its end."""
        self._take()
        with self._lock:
            self._phases[name] = {"peak": self._phase_high.to_dict(), "end": self._last.to_dict()}
            self._phase_high = self._last

    def finish(self) -> dict[str, Any]:
        """Stop the thread; everything seen, as the record keeps it."""
        self._stop.set()
        self._thread.join()
        split = self.baseline.anon_bytes is not None
        return {
            "method": METHODS.get(sys.platform, SAMPLED),
            "why_no_split": None if split else NO_SPLIT,
            "n_samples": self._samples,
            "peak_total_bytes": max(kernel_peak_bytes() or 0, self._high.total_bytes),
            "peak_anon_bytes": self._high.anon_bytes,
            "peak_file_bytes": self._high.file_bytes,
            "at_peak": self._top.to_dict(),
            "baseline": self.baseline.to_dict(),
            "phases": self._phases,
        }

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._take()

    def _take(self) -> None:
        with self._lock:
            now = usage()
            self._samples += 1
            self._last = now
            self._high = _highest(self._high, now)
            self._phase_high = _highest(self._phase_high, now)
            if now.total_bytes > self._top.total_bytes:
                self._top = now


def _highest(a: Usage, b: Usage) -> Usage:
    """The larger of each figure; they need not come from one moment."""
    return Usage(
        max(a.total_bytes, b.total_bytes),
        _larger(a.anon_bytes, b.anon_bytes),
        _larger(a.file_bytes, b.file_bytes),
    )


def _larger(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else max(a, b)


def _status() -> dict[str, int]:
    """The fields of /proc/self/status that are in kB, in bytes."""
    pairs = (line.split() for line in STATUS.read_text(encoding="ascii").splitlines())
    return {p[0][:-1]: 1024 * int(p[1]) for p in pairs if len(p) == 3 and p[2] == "kB"}
