"""Ctrl-C and SIGTERM in training: held back until a step is whole and its state saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Asked:
    """Whether a signal came that wants the run to end."""

    to_stop: bool = False


@contextlib.contextmanager
def held_back(wanted: bool = True) -> Iterator[Asked]:
    """The first signal is noted, the second does what it did before. Signals reach the main thread
    alone: in others nothing is held back."""
    asked = Asked()
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {one: signal.getsignal(one) for one in SIGNALS}
    # None is not Python's; a shell's job in the background ignores Ctrl-C, which is another's
    ours = {one: found for one, found in before.items() if found not in (None, signal.SIG_IGN)}

    def restore() -> None:
        for one, handler in ours.items():
            signal.signal(one, handler)

    def noted(signum: int, frame: object) -> None:
        asked.to_stop = True
        restore()

    for one in ours:
        signal.signal(one, noted)
    try:
        yield asked
    finally:
        restore()
