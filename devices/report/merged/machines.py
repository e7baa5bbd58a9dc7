"""Which machine and which of its devices a record speaks of, told from the hardware alone."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shortstack.devices.record_fields import MeasurementRecord
from shortstack.devices.records import Record
from shortstack.devices.report.charts import number

UUID_KEYS = ("uuid_sha256", "uuid_hash", "uuid")
"""Where a device's hashed serial may stand: two equal cards are two machines by it."""

MOST = 1e30
"""No figure of a machine is larger."""


@dataclass(frozen=True)
class Place:
    """A device of a machine. Two places are never shown under one name."""

    machine: str
    """Name of the machine, with its letter."""
    device: str
    name: str
    memory_bytes: int | None
    """What the device has; of a CPU the RAM, or less where a container limits it."""


@dataclass(frozen=True)
class Machine:
    """Hardware, and what was seen of it in its records."""

    name: str
    hosts: tuple[Mapping[str, Any], ...]
    gpus: tuple[tuple[str, Mapping[str, Any]], ...]
    """(id, facts) of the devices other than the CPU that were listed or measured."""
    runs: tuple[int, ...]
    ceilings: Mapping[str, Mapping[str, Any]]


class Places:
    """Every machine and place of some records; letters tell equal names apart."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._keys: list[str] = []
        self._hosts: dict[str, list[Mapping[str, Any]]] = {}
        self._gpus: dict[str, dict[str, Mapping[str, Any]]] = {}
        self._runs: dict[str, list[int]] = {}
        self._ceilings: dict[str, dict[str, Mapping[str, Any]]] = {}
        for run, record in enumerate(records, 1):
            self._see(run, record.host, record)
        self._names, self._letters = _lettered(
            {key: _machine_name(self._hosts[key][0], self._gpus[key]) for key in self._keys},
            {key: self._device_names(key) for key in self._keys},
        )

    def _see(self, run: int, host: Mapping[str, Any], record: Record) -> None:
        gpus = _gpus(host, record.measurements)
        key = _identity(record)
        if key not in self._keys:
            self._keys.append(key)
        self._hosts.setdefault(key, []).append(host)
        self._gpus.setdefault(key, {}).update(gpus)
        self._runs.setdefault(key, []).append(run)
        self._ceilings.setdefault(key, {}).update(record.ceilings)

    def _device_names(self, key: str) -> set[str]:
        return {_cpu(self._hosts[key][0]), *map(_gpu_name, self._gpus[key].values())}

    @property
    def machines(self) -> list[Machine]:
        return [
            Machine(
                self._names[key],
                tuple(self._hosts[key]),
                tuple(self._gpus[key].items()),
                tuple(self._runs[key]),
                self._ceilings[key],
            )
            for key in self._keys
        ]

    def place(self, record: Record, device: str) -> Place:
        key = _identity(record)
        letter = self._letters[key]
        if device == "cpu":
            host = self._hosts[key][0]  # not the record's own: a place is one, however often seen
            name = _cpu(host) + letter + (" CPU" if self._gpus[key] else "")
            return Place(self._names[key], device, name, ram_bytes(host))
        facts = self._gpus[key].get(device, {})
        name = _gpu_name(facts) or device
        alike = sum(_gpu_name(other) == name for other in self._gpus[key].values())
        name += letter + (f" ({device})" if alike > 1 else "")
        return Place(self._names[key], device, name, _whole(facts.get("vram_bytes")))


def ram_bytes(host: Mapping[str, Any]) -> int | None:
    """RAM, or the limit of the container where that is lower."""
    limits = [host.get("ram_bytes"), part(host, "cgroup").get("memory_bytes")]
    known = [value for value in map(_whole, limits) if value]
    return min(known) if known else None


def _identity(record: Record) -> str:
    """What two records of one machine share: parts, not software, load or settings.

    RAM counts in whole GB, since a kernel's own share of it changes with an update. Devices are
    those that the host lists: what else was measured (through Metal or Vulkan) may be the same
    card, and hangs on the runtime.
    """
    host = record.host
    gpus = _gpus(host, () if isinstance(host.get("devices"), list) else record.measurements)
    cpu, ram = part(host, "cpu"), _whole(host.get("ram_bytes"))
    facts = [
        *(cpu.get(name) for name in ("model", "physical_cores", "logical_cores")),
        None if ram is None else round(ram / 1e9),
        host.get("machine"),
        part(host, "cgroup"),
        sorted(
            [id_, _gpu_name(gpu), gpu.get("vram_bytes"), next(_uuids(gpu), None)]
            for id_, gpu in gpus.items()
        ),
    ]
    return json.dumps(facts, sort_keys=True, default=str)


def _gpus(
    host: Mapping[str, Any], measurements: Sequence[MeasurementRecord]
) -> dict[str, Mapping[str, Any]]:
    """Devices other than the CPU, by id: those of the listing, then what measurements say."""
    listed = host.get("devices")
    found: dict[str, Mapping[str, Any]] = {
        str(item["id"]): item
        for item in (listed if isinstance(listed, list) else [])
        if isinstance(item, Mapping) and item.get("id", "cpu") != "cpu"
    }
    for m in measurements:
        if m.device != "cpu":
            found[m.device] = {**found.get(m.device, {}), **m.device_info}
    return dict(sorted(found.items()))


def _uuids(gpu: Mapping[str, Any]) -> Any:
    return (gpu[key] for key in UUID_KEYS if gpu.get(key))


def _machine_name(host: Mapping[str, Any], gpus: Mapping[str, Mapping[str, Any]]) -> str:
    """`Example CPU 9000, 8 cores, 64 GB, 2 x NVIDIA H200`."""
    cores, ram = part(host, "cpu").get("physical_cores"), _whole(host.get("ram_bytes"))
    parts = [_cpu(host)]
    parts += [f"{cores} {'core' if cores == 1 else 'cores'}"] if cores else []
    parts += [f"{number(ram / 1e9)} GB"] if ram else []
    names = [_gpu_name(gpu) or id_ for id_, gpu in gpus.items()]
    for name in dict.fromkeys(names):
        count = names.count(name)
        parts.append(name if count == 1 else f"{count} x {name}")
    return ", ".join(parts)


def _lettered(
    names: Mapping[str, str], devices: Mapping[str, set[str]]
) -> tuple[dict[str, str], dict[str, str]]:
    """Machine names and letters by key; machines that share a name or a device get a letter."""
    letters = dict.fromkeys(names, "")
    alike = [
        key
        for key in names
        if any(names[key] == names[k] or devices[key] & devices[k] for k in names if k != key)
    ]
    for index, key in enumerate(alike):
        letters[key] = f" {_letter(index)}"
    return {key: name + letters[key] for key, name in names.items()}, letters


def _letter(index: int) -> str:
    """A to Z, then AA."""
    rest, digit = divmod(index, 26)
    return ("" if rest == 0 else _letter(rest - 1)) + string.ascii_uppercase[digit]


def _cpu(host: Mapping[str, Any]) -> str:
    model = str(part(host, "cpu").get("model") or "unknown CPU")
    return " ".join(re.sub(r"\((R|TM)\)", "", model, flags=re.IGNORECASE).split())


def _gpu_name(gpu: Mapping[str, Any]) -> str:
    return " ".join(str(gpu.get("name") or "").split())


def part(host: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A group of facts of a host; empty where the record has something else there."""
    found = host.get(name)
    return found if isinstance(found, Mapping) else {}


def amount(value: Any) -> float | None:
    """A number that can be shown and computed with; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < MOST else None


def _whole(value: Any) -> int | None:
    found = amount(value)
    return None if found is None else int(found)
