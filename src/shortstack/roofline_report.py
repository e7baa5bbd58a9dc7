"""Shares of the roofline and projections, as the merged report shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shortstack.devices.records import Record
from shortstack.devices.report.charts import number
from shortstack.devices.report.merged import Projected
from shortstack.devices.roofline.catalogue import Device, catalogue, find
from shortstack.devices.roofline.project import (
    ACCEPTS,
    Projection,
    memory_errors,
    project_all,
)
from shortstack.devices.roofline.share import Share, decode_share, prefill_share
from shortstack.errors import ShortstackError

ALL = "all"


def shares(record: Mapping[str, Any], ceilings: Mapping[str, Any]) -> tuple[Share, Share]:
    """Of decode and prefill; a `ShareOf` of the merged report."""
    return decode_share(record, ceilings), prefill_share(record, ceilings)


def projections(records: Sequence[Record], wanted: Sequence[str]) -> list[Projected]:
    """For the devices of the catalogue that are asked for by id; `all` of them.

    Raises ShortstackError for an id that the catalogue does not have, and for one on which no
    record can be projected.
    """
    if not wanted:
        return []
    asked = [find(name) for name in dict.fromkeys(wanted) if name != ALL]
    ids = set(catalogue()) if ALL in wanted else {device.id for device in asked}
    runs = [
        {
            "run_id": record.run_id,
            "ceilings": record.ceilings,
            "measurements": [m.model_dump(by_alias=True) for m in record.measurements],
        }
        for record in records
    ]
    found, refused = project_all(runs)
    if not found:
        why = refused[0] if refused else "no record is of its kind (GPU, CPU, Apple)"
        raise ShortstackError(f"nothing can be projected: {why}. Leave --project out.")
    for device in asked:
        if all(p.device.id != device.id for p in found):
            raise ShortstackError(_no_row(device, found, refused))
    return [_shown(p) for p in found if p.device.id in ids]


def _no_row(device: Device, found: Sequence[Projection], refused: Sequence[str]) -> str:
    """Why there is no projection on a device that was asked for."""
    if any(device.kind in ACCEPTS[p.fit.group.kind] for p in found):
        why = "it was measured itself"
    else:
        why = f"no record that can be its basis is of its kind ({device.kind})"
        why += f"; left out: {refused[0]}" if refused else ""
    return f"nothing can be projected on {device.id}: {why}. Leave it out of --project."


def _shown(p: Projection) -> Projected:
    source = next(point.source for point in p.fit.points if point.model == p.target.sha256)
    errors = p.fit.across_devices
    bandwidth = p.device.bandwidth_bytes_per_s
    error = "not known: one device was measured"
    if errors is not None:
        error = (
            f"at most {100 * errors.largest:.0f} % on {p.fit.n_devices} devices, left out in turn"
        )
    count = len(p.fit.points)
    work = [f"context {p.target.context_tokens}"]
    work += [f"batch {p.target.batch}"] if p.target.batch > 1 else []
    work += [f"{name} {value}" for name, value in p.fit.group.options]
    return Projected(
        artifact=f"{p.target.label}, {p.fit.group.spec}, {source['artifact']['n_layers']} layers",
        runtime=p.target.runtime,
        work=", ".join(work),
        device=p.device.name,
        decode_tokens_per_s=p.decode_tokens_per_s,
        low_tokens_per_s=p.low_tokens_per_s,
        high_tokens_per_s=p.high_tokens_per_s,
        error=error,
        need_bytes=None if p.need is None else p.need.total_bytes,
        fits=tuple((fit.have_bytes, fit.fits) for fit in p.fits() or ()),
        basis=f"{count} {'record' if count == 1 else 'records'} of {p.fit.group.spec} in "
        f"{p.fit.group.runtime}, bandwidth: {p.fit.basis}; efficiency "
        f"{number(p.fit.line.efficiency)} of {number(bandwidth.value / 1e9)} GB/s "
        f"({bandwidth.source})",
        notes=(*p.notes, *p.fit.notes, *_model_error(p), _memory_error(p)),
    )


def _model_error(p: Projection) -> list[str]:
    """How far off one model is by the others. On another device it may be more."""
    errors = p.fit.across_models
    if errors is None:
        return []
    return [
        f"models left out in turn, on the same devices: off by at most {100 * errors.largest:.0f} %"
    ]


def _memory_error(p: Projection) -> str:
    """How far off the memory is, as far as that is known."""
    if p.need is None:
        return "the memory it needs is not known"
    errors = memory_errors(p.fit.points, "device")
    if errors is None:
        return "the error of its memory is not known: it was measured on one device"
    return f"its memory is off by at most {100 * errors.largest:.0f} % on devices left out in turn"
