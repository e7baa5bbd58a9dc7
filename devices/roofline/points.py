"""Measured records as points of the roofline model: bytes a step, seconds, the device's speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shortstack.artifact import ExportSpec
from shortstack.devices.roofline.catalogue import recognise
from shortstack.devices.roofline.room import overhead_bytes, peak_bytes
from shortstack.devices.roofline.share import (
    Record,
    batch,
    device_kind,
    step_bytes,
    steps_per_s,
)
from shortstack.devices.stats import median

Run = Mapping[str, Any]
"""A `bench.json`."""
VENDOR, MEASURED = "vendor specification", "measured"


@dataclass(frozen=True)
class Group:
    """Records that one fit may hold: what differs between them is the model and the device."""

    kind: str
    runtime: str
    spec: str
    batch: int
    options: tuple[tuple[str, str], ...] = ()
    """The runtime's, as asked for: layers left on the CPU or another cache are another device."""


@dataclass(frozen=True)
class Point:
    """One record: `seconds` is its median decode step, `bytes` what the step reads."""

    record: str
    """Which one it is: run, label, runtime, format and device."""
    group: Group
    device: str
    catalogue_id: str | None
    model: str
    """SHA-256 of the artifact."""
    bytes: float
    seconds: float
    bandwidths: Mapping[str, float]
    """Bytes a second, by what is known of the device: `VENDOR`, `MEASURED`."""
    peak_bytes: float | None
    overhead_bytes: float | None
    source: Record

    def ideal_s(self, basis: str) -> float:
        """What the step takes where only the bandwidth counts."""
        return self.bytes / self.bandwidths[basis]


def points(runs: Sequence[Run]) -> tuple[list[Point], list[str]]:
    """A point for each record that has decode times and a device of known bandwidth, and for each
    that has not the reason why."""
    made: list[Point] = []
    refused: list[str] = []
    for run in runs:
        for record in run["measurements"]:
            found = _point(record, run)
            if isinstance(found, Point):
                made.append(found)
            else:
                refused.append(f"{_name(record, run)}: {found}")
    return made, refused


def groups(made: Sequence[Point]) -> dict[Group, list[Point]]:
    """The points by group, in the order that they came."""
    sorted_in: dict[Group, list[Point]] = {}
    for point in made:
        sorted_in.setdefault(point.group, []).append(point)
    return sorted_in


def _point(record: Record, run: Run) -> Point | str:
    rates = steps_per_s(record)
    if not rates:
        return "no timed trial ended"
    if step_bytes(record) <= 0:
        return "how many bytes a token reads is unknown"
    device = record.get("device", "cpu")
    info = record.get("device_info") or {}
    # A part of a card has the whole card's name, not its bandwidth.
    known = None if info.get("mig") else recognise(info.get("name"))
    bandwidths = {}
    if known is not None:
        bandwidths[VENDOR] = known.bandwidth_bytes_per_s.value
    if own := (run.get("ceilings") or {}).get(device):
        bandwidths[MEASURED] = float(own["read_bytes_per_s"])
    if not bandwidths:
        return f"the bandwidth of {device} was not measured and it is in no catalogue"
    return Point(
        record=_name(record, run),
        group=Group(
            kind=device_kind(device),
            runtime=record["runtime"],
            spec=_slug(record),
            batch=batch(record),
            options=tuple(sorted(record.get("options", {}).items())),
        ),
        device=_device_name(record, known.name if known else None),
        catalogue_id=known.id if known else None,
        model=record["artifact"]["sha256"],
        bytes=step_bytes(record),
        seconds=1 / median(rates),
        bandwidths=bandwidths,
        peak_bytes=peak_bytes(record),
        overhead_bytes=overhead_bytes(record),
        source=record,
    )


def _slug(record: Record) -> str:
    spec = record["artifact"]["spec"]
    return ExportSpec(
        spec["format"], spec["precision"], tuple(sorted(spec.get("options", {}).items()))
    ).slug


def _name(record: Record, run: Run) -> str:
    device = record.get("device", "cpu")
    label, runtime = record["label"], record["runtime"]
    return f"{run['run_id'][:8]}: {label} {_slug(record)}, {runtime}, {device}"


def _device_name(record: Record, known: str | None) -> str:
    info, host = record.get("device_info") or {}, record.get("host") or {}
    named = known or info.get("name") or (host.get("cpu") or {}).get("model")
    return str(named or record.get("device", "cpu"))
