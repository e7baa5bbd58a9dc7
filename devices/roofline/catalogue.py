"""Devices that may not be at hand: what their vendors say, each figure with its source."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortstack.errors import ShortstackError, unknown

SHIPPED = Path(__file__).with_name("catalogue.yaml")
KINDS = ("gpu", "cpu", "unified")
KEYS = {"name", "kind", "bandwidth", "memory", "power", "dense", "spellings"}
TYPES = {"float16", "bfloat16", "int8"}
GIGA, TERA, GIB = 1e9, 1e12, 2**30


@dataclass(frozen=True)
class Figure:
    """A vendor's specification, in the unit of the field that holds it."""

    value: float
    source: str
    """Title of the vendor's document or page."""
    note: str | None = None
    """How it follows from the vendor's figures, where it is not one itself."""


@dataclass(frozen=True)
class Device:
    """One entry. `kind`: gpu, cpu, or unified (one memory for both, Apple's)."""

    id: str
    name: str
    kind: str
    bandwidth_bytes_per_s: Figure
    memory_bytes: tuple[int, ...]
    """The sizes it is sold with, smallest first."""
    memory_source: str
    power_w: Figure | None = None
    dense_ops_per_s: Mapping[str, Figure] = field(default_factory=dict)
    spellings: tuple[str, ...] = ()
    """How the driver names it. A CPU has none: its name does not tell the memory it has."""


@functools.cache
def catalogue(path: Path = SHIPPED) -> Mapping[str, Device]:
    """All entries by id. Raises ShortstackError for a file that breaks the rules in its head."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        sources, devices = data["sources"], data["devices"]
        return {key: _device(key, entry, sources) for key, entry in devices.items()}
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        fact = " ".join(str(error).split())
        raise ShortstackError(f"{path.name} is damaged: {fact}. Correct the entry.") from None


def find(device_id: str) -> Device:
    """The entry of that id."""
    try:
        return catalogue()[device_id]
    except KeyError:
        raise unknown("device", device_id, catalogue()) from None


def recognise(driver_name: str | None) -> Device | None:
    """The entry of a card that is here, by the name that its driver gives; None for others."""
    return next((d for d in catalogue().values() if driver_name in d.spellings), None)


def _device(key: str, entry: dict[str, Any], sources: dict[str, str]) -> Device:
    if more := set(entry) - KEYS:
        raise ValueError(f"{key} has unknown fields {sorted(more)}")
    if entry["kind"] not in KINDS:
        raise ValueError(f"{key} is of kind {entry['kind']!r}, known: {', '.join(KINDS)}")
    dense = entry.get("dense", {})
    if more := set(dense) - TYPES:
        raise ValueError(f"{key} has operations of unknown types {sorted(more)}")
    sizes, memory_source = entry["memory"]
    if not sizes or sizes != sorted(set(sizes)) or sizes[0] <= 0:
        raise ValueError(f"{key}: memory sizes must ascend from above 0, got {sizes}")
    return Device(
        id=key,
        name=entry["name"],
        kind=entry["kind"],
        bandwidth_bytes_per_s=_figure(key, entry["bandwidth"], GIGA, sources),
        memory_bytes=tuple(int(size * GIB) for size in sizes),
        memory_source=sources[memory_source],
        power_w=_figure(key, entry["power"], 1, sources) if "power" in entry else None,
        dense_ops_per_s={t: _figure(key, f, TERA, sources) for t, f in dense.items()},
        spellings=tuple(entry.get("spellings", ())),
    )


def _figure(key: str, given: list[Any], unit: float, sources: dict[str, str]) -> Figure:
    value, source, *note = given
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{key}: {value!r} is no figure above 0")
    return Figure(value * unit, sources[source], *note)
