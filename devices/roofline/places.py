"""Which of my machines would hold what: every measured model where it was not run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shortstack.devices.roofline.room import (
    Fit,
    Target,
    fits,
    need,
    overhead_bytes,
    target,
)
from shortstack.devices.roofline.share import Record
from shortstack.devices.stats import median


@dataclass(frozen=True)
class Seat:
    """A device of a machine: its name, kind (gpu, cpu, unified), memory where that is known."""

    name: str
    kind: str
    have_bytes: int | None


@dataclass(frozen=True)
class Place:
    """One model on one device. `fit` is None with the `reason`."""

    seat: Seat
    target: Target
    source: Record
    """The record with the model's longest context."""
    fit: Fit | None
    reason: str | None = None


def places(runs: Sequence[tuple[Record, Seat]]) -> list[Place]:
    """A row for each model (artifact, runtime, batch, options) and seat that it was not run on, at
    the longest context it was measured with. What a run takes beyond weights and cache comes from
    records of its runtime under its options on devices of that kind."""
    models: dict[tuple[object, ...], list[tuple[Record, Seat]]] = {}
    for record, seat in runs:
        wanted = target(record)
        key = (wanted.sha256, wanted.runtime, wanted.batch, _options(record))
        models.setdefault(key, []).append((record, seat))
    seats = dict.fromkeys(seat for _, seat in runs)
    made = []
    for own in models.values():
        source = max((record for record, _ in own), key=lambda r: target(r).context_tokens)
        run_on = {seat for _, seat in own}
        made += [_place(seat, source, runs) for seat in seats if seat not in run_on]
    return made


def _place(seat: Seat, source: Record, runs: Sequence[tuple[Record, Seat]]) -> Place:
    wanted = target(source)
    overheads = [
        overhead
        for record, its in runs
        if record["runtime"] == wanted.runtime
        and its.kind == seat.kind
        and _options(record) == _options(source)
        and (overhead := overhead_bytes(record)) is not None
    ]
    if wanted.kv_bytes_per_token is None:
        return Place(seat, wanted, source, None, "the cache's bytes a token are unknown")
    if seat.have_bytes is None:
        return Place(seat, wanted, source, None, "the device's memory is unknown")
    taken = need(wanted, median(overheads)) if overheads else None
    if taken is None:
        reason = f"{wanted.runtime} was never watched for memory on a device of this kind"
        return Place(seat, wanted, source, None, reason)
    return Place(seat, wanted, source, fits(taken.total_bytes, seat.have_bytes, seat.kind))


def _options(record: Record) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(record.get("options", {}).items()))
