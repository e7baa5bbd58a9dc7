"""What a device's sensors say at one moment, and what two such moments tell about the time between.

A mere reading of counters: nothing is put to work, a snapshot takes milliseconds.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shortstack.devices import nvidia
from shortstack.devices.host import container

CPU = Path("/sys/devices/system/cpu")
HARMLESS = {"idle", "application clocks", "display clocks"}
"""Slowdowns that a user chose or that end as soon as there is work."""

HELD_BACK_S = 0.01
"""Less clock time lost than this is not told: a driver counts in steps of milliseconds."""

SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")
HIDDEN = "the driver tells process ids of another namespace: this is a container"
NO_LIST = "the driver does not list processes"


def snapshot(device_id: str) -> dict[str, Any]:
    """Clocks, temperature, power, what holds the clocks back, who else is there; now.

    Never raises: a device that does not answer gives `reason`. What cannot be read is left out for
    the CPU, None for a card. `on_battery` is there where the machine has a battery.
    """
    power = on_battery()
    battery = {} if power is None else {"on_battery": power}
    if device_id == "cpu":
        return battery | _processor()
    if not device_id.startswith("cuda:"):
        return battery | {"reason": f"{device_id} has no counters that this tool reads"}
    try:
        return battery | _card(nvidia.card(device_id))
    except nvidia.NoAnswerError as error:
        return battery | {"reason": str(error)}


def flags(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What should make a reader doubt a trial, from snapshots on both sides of it."""
    found = []
    if throttled := _throttled(before, after):
        found.append(f"throttled: {', '.join(throttled)}")
    others = max((s.get("other_processes") or 0 for s in (before, after)), default=0)
    if others:
        found.append(f"foreign process: {others} on the device")
    if "reason" in after and "reason" not in before:
        found.append(f"device lost: {after['reason']}")
    if before.get("on_battery") or after.get("on_battery"):
        found.append("on battery")
    return found


def on_battery() -> bool | None:
    """Whether the machine runs on its battery; None where it has none or does not tell."""
    import psutil

    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return None if battery is None or battery.power_plugged is None else not battery.power_plugged


def other_processes(one: nvidia.Card) -> dict[str, Any]:
    """How many processes but this one and its children hold memory on a card.

    None with a reason where ids cannot be matched: a container's are not those that the driver
    tells, and an empty list in a container may leave out what runs beside it.
    """
    import psutil

    listed = one.processes()
    if listed is None:
        return {"other_processes": None, "other_processes_reason": NO_LIST}
    me = psutil.Process()
    ours = {me.pid, *(child.pid for child in me.children(recursive=True))}
    hidden = not listed and container() is not None
    if hidden or not all(psutil.pid_exists(pid) for pid in listed):
        return {"other_processes": None, "other_processes_reason": HIDDEN}
    return {"other_processes": len(listed.keys() - ours)}


def _card(one: nvidia.Card) -> dict[str, Any]:
    use = one.ask("nvmlDeviceGetUtilizationRates")
    return {
        "sm_clock_mhz": one.ask("nvmlDeviceGetClockInfo", nvidia.CLOCK_SM),
        "memory_clock_mhz": one.ask("nvmlDeviceGetClockInfo", nvidia.CLOCK_MEMORY),
        "temperature_c": nvidia.temperature_c(one),
        "power_w": nvidia.watts(one, "nvmlDeviceGetPowerUsage"),
        "throttle_reasons": nvidia.slowdowns(one),
        "held_back_s": nvidia.held_back_s(one),
        "gpu_busy_share": None if use is None else use.gpu / 100,
        "memory_busy_share": None if use is None else use.memory / 100,
        "pcie_generation": one.ask("nvmlDeviceGetCurrPcieLinkGeneration"),
        "pcie_width": one.ask("nvmlDeviceGetCurrPcieLinkWidth"),
        **other_processes(one),
    }


def _processor() -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if (celsius := _cpu_temperature_c()) is not None:
        facts["temperature_c"] = celsius
    if (events := _throttle_events()) is not None:
        facts["throttle_events"] = events
    return facts


def _cpu_temperature_c() -> float | None:
    """The hottest sensor of the processor."""
    import psutil

    if not hasattr(psutil, "sensors_temperatures"):
        return None
    sensors = psutil.sensors_temperatures()
    told = [s.current for name in SENSORS for s in sensors.get(name, ()) if s.current]
    return max(told, default=None)


def _throttle_events() -> int | None:
    """Grows when heat slows cores down (Linux on x86); every core also counts its package's."""
    if sys.platform != "linux":
        return None
    files = list(CPU.glob("cpu[0-9]*/thermal_throttle/*_throttle_count"))
    return sum(int(file.read_text(encoding="ascii")) for file in files) if files else None


def _throttled(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    reasons = [r for s in (before, after) for r in s.get("throttle_reasons") or ()]
    words = [reason for reason in dict.fromkeys(reasons) if reason not in HARMLESS]
    then, now = before.get("held_back_s") or {}, after.get("held_back_s") or {}
    for name in filter(then.__contains__, now):
        if (lost := now[name] - then[name]) >= HELD_BACK_S:
            words.append(f"{name} policy for {lost:.2f} s")
    events = (after.get("throttle_events") or 0) - (before.get("throttle_events") or 0)
    if "throttle_events" in before and events > 0:
        words.append("heat slowed the processor down")
    return words
