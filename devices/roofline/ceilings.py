"""Measure what a device can do at most, in a fresh process: memory reading, matrix products."""

from __future__ import annotations

import re
from typing import Any

from shortstack import child
from shortstack.devices.nvidia import ORDER
from shortstack.devices.roofline.cpu import threads_or_all
from shortstack.devices.roofline.products import SINGLE_THREADED
from shortstack.errors import ShortstackError, require

BUDGET_S = 3.0
TIMEOUT_S = 120.0
"""Beyond the budget: importing torch from a cold disk takes most of it."""
CUDA = re.compile(r"cuda:(\d+)")


def measure(
    device: str,
    *,
    threads: int | None = None,
    budget_s: float = BUDGET_S,
    timeout_s: float = TIMEOUT_S,
) -> dict[str, Any]:
    """Ceilings of `device` (`cpu`, `cuda:0`, ...), as records keep them (docs/roofline.md).

    `threads` (CPU only) are those that the models will run with; None takes one a usable core.
    Raises ShortstackError for a device that is not there or has no memory left, MissingExtraError
    where a card is to be measured without torch, ChildCrashError if measuring died or hung.
    """
    if budget_s <= 0:
        raise ShortstackError(f"ceilings: budget_s is {budget_s:g}, it must be above 0.")
    if device == "cpu":
        request = {"threads": threads_or_all(threads), "budget_s": budget_s}
        return _call("cpu", request, timeout_s + budget_s)
    card = CUDA.fullmatch(device)
    if card is None:
        raise ShortstackError(
            f"ceilings of {device!r} cannot be measured. Known: cpu, cuda:0, cuda:1, ..."
        )
    require(["torch"], "prune", f"measuring the ceilings of {device}")
    return _call("cuda", {"index": int(card[1]), "budget_s": budget_s}, timeout_s + budget_s)


def _call(kind: str, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    return child.call(
        f"shortstack.devices.roofline.{kind}:ceilings",
        request,
        timeout_s=timeout_s,
        what=f"measuring the ceilings of {kind}",
        env=SINGLE_THREADED if kind == "cpu" else ORDER,
    )
