"""What models can run on here, and why not on more. Nothing raises where a driver is missing."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from shortstack import llama_devices
from shortstack.devices import nvidia
from shortstack.devices.conditions import other_processes
from shortstack.devices.host import cpu_model
from shortstack.errors import ShortstackError, unknown

DIVIDED = (
    "MIG is on: CUDA sees a part of this card, these facts are of all of it. Name the part in "
    "CUDA_VISIBLE_DEVICES"
)


def devices() -> list[dict[str, Any]]:
    """The CPU, then every NVIDIA card: milliseconds. Each has `id`, `kind` and `name`."""
    return [_cpu(), *nvidia_cards()[0]]


def nvidia_cards() -> tuple[list[dict[str, Any]], str | None]:
    """What NVML tells of each card, and None; or none and the reason."""
    try:
        found = [nvidia.describe(one) | other_processes(one) for one in nvidia.cards()]
    except nvidia.NoAnswerError as error:
        return [], str(error)
    found = [one | {"note": DIVIDED} if one["mig"] else one for one in found]
    return found, None if found else "no NVIDIA card is here or CUDA_VISIBLE_DEVICES hides it"


@functools.cache
def survey() -> dict[str, Any]:
    """Everything: `devices()`, what llama.cpp's own list adds, and `missing`: kind -> reason.

    Takes a second, once: llama.cpp is asked in a child. A card that both know is one device, with
    `llama_cpp` its name there.
    """
    cards, no_cards = nvidia_cards()
    others, no_others = llama_devices.devices()
    missing = {"cuda": no_cards, "llama.cpp": no_others}
    return {
        "devices": merged([_cpu(), *cards], others),
        "missing": {kind: reason for kind, reason in missing.items() if reason},
    }


def device(device_id: str) -> dict[str, Any]:
    """Facts about one device, for `device_info`. Raises ShortstackError for one not here."""
    quick = {one["id"]: one for one in devices()}
    if device_id in quick:
        return quick[device_id]
    known = {one["id"]: one for one in survey()["devices"]}
    if device_id not in known:
        reason = survey()["missing"].get(device_id.partition(":")[0])
        if reason:
            raise ShortstackError(f"device {device_id!r} is not here: {reason}")
        raise unknown("device", device_id, known)
    found: dict[str, Any] = known[device_id]
    return found


def merged(
    ours: Sequence[Mapping[str, Any]], llamas: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Both lists as one; of a device on both, our facts and llama.cpp's name for it."""
    theirs = {one["id"]: one for one in llamas}
    both = [
        dict(one) | ({"llama_cpp": theirs[one["id"]]["llama_cpp"]} if one["id"] in theirs else {})
        for one in ours
    ]
    return both + [dict(one) for one in llamas if one["id"] not in {mine["id"] for mine in ours}]


def _cpu() -> dict[str, Any]:
    return {"id": "cpu", "kind": "cpu", "name": cpu_model()}
