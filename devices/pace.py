"""How long a campaign will still take, from the trials that it has run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from shortstack.devices.stats import median


class Pace:
    """Learns what a trial of each kind and case takes; guesses the rest from the others."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int], list[float]] = defaultdict(list)

    def add(self, kind: str, case: int, seconds: float) -> None:
        self._seen[kind, case].append(seconds)

    def left_s(self, todo: Iterable[tuple[str, int]]) -> float | None:
        """Seconds for the trials `todo`; None before the first one has ended."""
        if not self._seen:
            return None
        return sum(self._guess(kind, case) for kind, case in todo)

    def _guess(self, kind: str, case: int) -> float:
        of_case = {k: times for (k, c), times in self._seen.items() if c == case}
        known = of_case.get(kind) or next(iter(of_case.values()), None)
        if known is None:
            of_kind = [t for (k, _), times in self._seen.items() if k == kind for t in times]
            known = of_kind or [t for times in self._seen.values() for t in times]
        return median(known)


def in_words(seconds: float | None) -> str:
    """`4 min left`: no finer than the guess is good for."""
    if seconds is None:
        return "time left unknown"
    if seconds < 90:
        return f"{seconds:.0f} s left"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min left"
    return f"{seconds / 3600:.1f} h left"
