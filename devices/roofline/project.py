"""Speed and memory on devices that are not at hand, projected from records of those that are.

A projection is never a measurement: it says so, names the records it rests on and the error that
the same fit makes on what was measured (docs/roofline.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shortstack.devices.roofline.catalogue import Device, catalogue
from shortstack.devices.roofline.least_squares import Errors, Line, fit_line, leave_one_out
from shortstack.devices.roofline.points import (
    MEASURED,
    VENDOR,
    Group,
    Point,
    Run,
    groups,
    points,
)
from shortstack.devices.roofline.room import Fit, Need, Target, fits, need, target
from shortstack.devices.stats import median
from shortstack.errors import ShortstackError

ACCEPTS = {"gpu": ("gpu",), "cpu": ("cpu", "unified"), "unified": ("unified",)}
"""Kind measured -> kinds of the catalogue that it is projected on."""


@dataclass(frozen=True)
class DecodeFit:
    """`t = overhead + bytes / (efficiency x bandwidth)`, fitted on `points` of one group."""

    group: Group
    line: Line
    basis: str
    """Which bandwidth the devices' is: `VENDOR` or `MEASURED`."""
    points: tuple[Point, ...]
    across_devices: Errors | None
    """Left out device by device; None where there is one device only."""
    across_models: Errors | None
    """Left out model by model, on the same devices; None where there is one model only."""
    notes: tuple[str, ...]

    @property
    def n_devices(self) -> int:
        return len({p.device for p in self.points})


@dataclass(frozen=True)
class Projection:
    """What one device is expected to do with one model. Never measured."""

    device: Device
    target: Target
    fit: DecodeFit
    decode_tokens_per_s: float
    low_tokens_per_s: float | None
    """With `high`: what the largest error across devices leaves; None where that is unknown."""
    high_tokens_per_s: float | None
    need: Need | None
    notes: tuple[str, ...]

    def fits(self) -> list[Fit] | None:
        """For each memory size that the device is sold with; None where the need is unknown."""
        if self.need is None:
            return None
        total = self.need.total_bytes
        return [fits(total, have, self.device.kind) for have in self.device.memory_bytes]


def fit(members: Sequence[Point]) -> DecodeFit:
    """Fit the records of one group. Raises ShortstackError for none, or for several groups."""
    if len({p.group for p in members}) != 1:
        raise ShortstackError(
            f"a projection rests on records of one runtime, format, batch and options, these are "
            f"of {len({p.group for p in members})}. Measure first, then project each apart."
        )
    basis = VENDOR if all(VENDOR in p.bandwidths for p in members) else MEASURED
    used = [p for p in members if basis in p.bandwidths]
    notes = [
        f"{p.record} is left out: its bandwidth was not measured"
        for p in members
        if basis not in p.bandwidths
    ]
    ideal, seconds = [p.ideal_s(basis) for p in used], [p.seconds for p in used]
    line = fit_line(ideal, seconds)
    if line.overhead_s == 0:
        notes.append("no overhead a token could be told apart: all time is put down to reading")
    if line.efficiency > 1:
        notes.append("the efficiency is above 1: caches served part of the reading")
    return DecodeFit(
        group=used[0].group,
        line=line,
        basis=basis,
        points=tuple(used),
        across_devices=leave_one_out(ideal, seconds, [p.device for p in used]),
        across_models=leave_one_out(ideal, seconds, [p.model for p in used]),
        notes=tuple(notes),
    )


def project(device: Device, wanted: Target, fitted: DecodeFit) -> Projection:
    """Decode speed and memory of the target on a device of the catalogue."""
    ideal_s = wanted.step_bytes / device.bandwidth_bytes_per_s.value
    rate = wanted.batch / fitted.line.seconds(ideal_s)
    low, high = _band(rate, fitted.across_devices)
    overheads = [p.overhead_bytes for p in fitted.points if p.overhead_bytes is not None]
    taken = need(wanted, median(overheads)) if overheads else None
    return Projection(
        device,
        wanted,
        fitted,
        rate,
        low,
        high,
        taken,
        tuple(_notes(device, wanted, fitted, ideal_s)),
    )


def project_all(
    runs: Sequence[Run], context_tokens: int | None = None
) -> tuple[list[Projection], list[str]]:
    """Every measured model, at every context it was measured with (else at `context_tokens`), on
    every catalogue device of the kinds that its records speak for, and why records were left out.

    A device that a fit rests on is not projected by it.
    """
    made, refused = points(runs)
    projections = []
    for group, members in groups(made).items():
        fitted = fit(members)
        seen = {p.catalogue_id for p in fitted.points}
        wished = [target(p.source, context_tokens) for p in fitted.points]
        targets = {(t.sha256, t.context_tokens): t for t in wished}
        for device in catalogue().values():
            if device.kind in ACCEPTS[group.kind] and device.id not in seen:
                projections += [project(device, wanted, fitted) for wanted in targets.values()]
    return projections, refused


def memory_errors(members: Sequence[Point], by: Literal["device", "model"]) -> Errors | None:
    """Predicted over measured peak, minus 1, where each `by` (device or model) is predicted with
    the overhead of the others; None where there is one, or memory was not measured."""
    known = [
        (getattr(p, by), p.overhead_bytes, p.peak_bytes)
        for p in members
        if p.overhead_bytes is not None and p.peak_bytes
    ]
    relative: list[float] = []
    for left in dict.fromkeys(key for key, _, _ in known):
        rest = [overhead for key, overhead, _ in known if key != left]
        if not rest:
            return None
        guess = median(rest)
        relative += [(guess - own) / peak for key, own, peak in known if key == left]
    return Errors(tuple(relative)) if relative else None


def _band(rate: float, errors: Errors | None) -> tuple[float | None, float | None]:
    """Error e is predicted over true, minus 1, so the truth is predicted over 1 + e."""
    if errors is None:
        return None, None
    largest = errors.largest
    return rate / (1 + largest), (rate / (1 - largest) if largest < 1 else None)


def _notes(device: Device, wanted: Target, fitted: DecodeFit, ideal_s: float) -> list[str]:
    notes = []
    if fitted.across_devices is None:
        only = fitted.points[0].device
        notes.append(f"fitted on {only} alone: the error across devices is unknown")
    if fitted.basis == MEASURED:
        notes.append(
            "fitted on measured bandwidth, projected with the vendor's, which no device reaches: "
            "the projection is too high by what lies between them"
        )
    if device.kind != fitted.group.kind:
        notes.append(f"{device.kind} memory is projected from records of {fitted.group.kind} runs")
    if wanted.kv_bytes_per_token is None:
        notes.append("the cache's bytes are unknown: only weights count, memory is not projected")
    seen = [p.ideal_s(fitted.basis) for p in fitted.points]
    if not min(seen) / 2 <= ideal_s <= max(seen) * 2:
        notes.append("more than twice outside of what was measured: extrapolated")
    return notes
