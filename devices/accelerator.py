"""What a trial asks of the device that is not the CPU: its state, its memory. Empty on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


def snapshot(device: str) -> dict[str, Any]:
    """Clocks, temperature, throttle reasons and power at this moment."""
    return {}


@contextlib.contextmanager
def device_memory(device: str) -> Iterator[Callable[[], dict[str, Any] | None]]:
    """Watch the device's memory within the block; what is yielded tells of it afterwards."""
    yield lambda: None
