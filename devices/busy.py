"""How much of the machine others used meanwhile."""

from __future__ import annotations

import time


class CpuClock:
    """How much of the machine's CPU time went to others while we ran."""

    LEAST_S = 0.5
    """Systems count CPU time in steps of 10 ms: a shorter window says nothing."""

    def __init__(self) -> None:
        import psutil

        self._psutil = psutil
        self._process = psutil.Process()
        self.restart()

    def restart(self) -> None:
        self._wall = time.perf_counter()
        self._all, self._own = self._read()

    def foreign_share(self) -> float | None:
        """Busy time of all cores that was not ours, over the time of all cores."""
        busy, own = self._read()
        wall = time.perf_counter() - self._wall
        if wall < self.LEAST_S:
            return None
        foreign = (busy - self._all) - (own - self._own)
        share = foreign / (wall * (self._psutil.cpu_count() or 1))
        return round(min(1.0, max(0.0, share)), 4)

    def _read(self) -> tuple[float, float]:
        times = self._psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        # Linux counts guests twice: inside user, and apart.
        twice = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        own = self._process.cpu_times()
        return sum(times) - idle - twice, own.user + own.system
