"""What a piece of work took: wall time, and the most anonymous memory of this process and of all
it started, together.

Anonymous memory is what the work really holds. The kernel's own peak (VmHWM) also counts pages of
mapped files, which it drops when something else needs the room: a mapped checkpoint would make an
export look as large as the model. Linux alone tells the two apart, elsewhere the peak is None.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERVAL_S = 0.01
PROCESS_BYTES = 50_000_000
"""What a process of the command line holds before it begins an export: part of predictions."""

PROC = Path("/proc")
FLAGS, NOT_EXECUTED = 6, 0x40
"""Which field of /proc/PID/stat behind the name has the process flags, and PF_FORKNOEXEC."""


@dataclass(frozen=True)
class Footprint:
    """Wall time and memory of one piece of work. A peak shorter than the pause between two samples
    may be missed. None: this system does not tell anonymous memory from mapped files."""

    wall_s: float
    peak_anon_bytes: int | None
    start_anon_bytes: int | None
    n_samples: int

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Meter:
    """Samples from a thread between `start` and `stop`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._began_s = time.perf_counter()
        self._at_start = self._peak = anonymous_bytes(pid)
        self._n_samples = 1
        self._stopped = threading.Event()
        self._made: Footprint | None = None
        self._thread = threading.Thread(target=self._watch, name="footprint", daemon=True)
        if self._peak is not None:
            self._thread.start()

    @property
    def footprint(self) -> Footprint:
        """Known when the work is done."""
        assert self._made is not None, "the work is still being measured"
        return self._made

    def stop(self) -> None:
        wall_s = time.perf_counter() - self._began_s
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()
            self.sample()
        self._made = Footprint(round(wall_s, 3), self._peak, self._at_start, self._n_samples)

    def _watch(self) -> None:
        while not self._stopped.wait(INTERVAL_S):
            self.sample()

    def sample(self) -> None:
        """Look now."""
        now = anonymous_bytes(self._pid)
        if now is not None and self._peak is not None:
            self._peak = max(self._peak, now)
            self._n_samples += 1


@contextlib.contextmanager
def measured(pid: int | None = None) -> Iterator[Meter]:
    """Measure the block, in this process or in another; the meter's `footprint` is there after it,
    also if it raised."""
    meter = Meter(os.getpid() if pid is None else pid)
    try:
        yield meter
    finally:
        meter.stop()


def anonymous_bytes(pid: int) -> int | None:
    """Anonymous memory, swapped out or not, of a process and all it started; 0 if it is gone, None
    where the system does not tell."""
    if sys.platform != "linux":
        return None
    return _own_bytes(pid) + sum(_tree_bytes(child) for child in _children(pid))


def _tree_bytes(pid: int) -> int:
    """A child between fork and exec shows its parent's pages as its own: not counted twice."""
    try:
        flags = int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[FLAGS])
    except (OSError, IndexError, ValueError):  # it has ended
        return 0
    own = 0 if flags & NOT_EXECUTED else _own_bytes(pid)
    return own + sum(_tree_bytes(child) for child in _children(pid))


def _own_bytes(pid: int) -> int:
    try:
        lines = (PROC / str(pid) / "status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    fields = (line.split() for line in lines.splitlines())
    return sum(1024 * int(f[1]) for f in fields if f and f[0] in ("RssAnon:", "VmSwap:"))


def _children(pid: int) -> list[int]:
    """Of every thread, as the kernel lists them."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in (PROC / str(pid) / "task").iterdir():
            with contextlib.suppress(OSError):
                found += map(int, (task / "children").read_text().split())
    return found


def against(footprint: Footprint, predicted_peak_bytes: int) -> dict[str, Any]:
    """The footprint as manifests record it, with the prediction for a process that held what this
    one really did when the work began."""
    held = footprint.start_anon_bytes
    predicted = predicted_peak_bytes + (0 if held is None else held - PROCESS_BYTES)
    return {**footprint.to_dict(), "predicted_peak_bytes": predicted}


def in_words(facts: Mapping[str, Any]) -> str:
    """`peak memory 212 MB, predicted 350 MB; time 3.2 s`, of what a manifest records."""
    peak, predicted = facts["peak_anon_bytes"], facts.get("predicted_peak_bytes")
    words = "peak memory unknown here" if peak is None else f"peak memory {_megabytes(peak)}"
    if predicted is not None:
        words += f", predicted {_megabytes(predicted)}"
    return f"{words}; time {facts['wall_s']:.1f} s"


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.0f} MB"
