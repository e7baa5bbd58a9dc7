"""How a campaign runs, whatever it measures; what a record says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shortstack.devices.schedule import ORDER
from shortstack.devices.worker import STEADY, WARMUP_S, WINDOW

OPENER = "shortstack.runtimes:open_session"


@dataclass(frozen=True)
class Protocol:
    """How a campaign runs, whatever it measures."""

    seed: int = 0
    timeout_s: float = 900.0
    cold: bool = False
    """Every second timed round drops the artifact from the page cache before it loads."""
    energy: bool = False
    """A trial for the energy of each case, where the device has counters."""
    opener: str = OPENER
    """`module:function` with the signature of `runtimes.open_session`."""

    def to_dict(self) -> dict[str, Any]:
        """What the record says of it."""
        return {
            "order": ORDER,
            "seed": self.seed,
            "fresh_process_per_trial": True,
            "warm_up": (
                f"until the medians of the last two windows of {WINDOW} decode steps differ "
                f"by at most {100 * STEADY:g} %, or as many steps as the workload "
                f"allows, or {WARMUP_S:g} s"
            ),
            "cold_loads": "every second timed round" if self.cold else "none",
            "garbage_collector": "off while the clock runs",
            "decoding": "greedy argmax on the host, end of text ignored",
            "clock": "time.perf_counter",
            "timeout_s": self.timeout_s,
        }
