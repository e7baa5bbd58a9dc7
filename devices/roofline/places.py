"""Which of my machines runs this: every measured model on every machine that has a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shortstack.devices.roofline.fits import (
    Fit,
    Need,
    Target,
    fits,
    machine,
    need,
    overhead_bytes,
    target,
)
from shortstack.devices.roofline.share import Record, device_kind
from shortstack.devices.stats import median

MEASURED, ELSEWHERE = "measured on this machine", "measured on other machines"


@dataclass(frozen=True)
class Place:
    """One model on one machine. `fit` is None with the `reason`."""

    machine: str
    kind: str
    target: Target
    need: Need | None
    fit: Fit | None
    overhead_from: str | None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "need": {**asdict(self.need), "total_bytes": self.need.total_bytes}
            if self.need
            else None,
            "fit": self.fit.to_dict() if self.fit else None,
        }


def places(records: Sequence[Record], context_tokens: int | None = None) -> list[Place]:
    """A row for each model (artifact, runtime) and machine. What a run takes beyond weights and
    cache comes from that model's own record on that machine, else from records of its runtime on
    devices of that kind."""
    machines = dict.fromkeys(m for r in records if (m := machine(r)) is not None)
    models: dict[tuple[str, str, int], Target] = {}
    for record in records:
        wanted = target(record, context_tokens)
        models.setdefault((wanted.sha256, wanted.runtime, wanted.batch), wanted)
    return [_place(m, wanted, records) for wanted in models.values() for m in machines]


def _place(here: tuple[str, int, str], wanted: Target, records: Sequence[Record]) -> Place:
    name, have, kind = here
    alike = [
        r
        for r in records
        if r["runtime"] == wanted.runtime and device_kind(r.get("device", "cpu")) == kind
    ]
    own = [r for r in alike if machine(r) == here and r["artifact"]["sha256"] == wanted.sha256]
    for source, found in ((MEASURED, own), (ELSEWHERE, alike)):
        overheads = [o for r in found if (o := overhead_bytes(r)) is not None]
        taken = need(wanted, median(overheads)) if overheads else None
        if taken is not None:
            return Place(name, kind, wanted, taken, fits(taken.total_bytes, have, kind), source)
    reason = (
        "the cache's bytes a token are unknown"
        if wanted.kv_bytes_per_token is None
        else f"{wanted.runtime} was never watched for memory on a device of this kind"
    )
    return Place(name, kind, wanted, None, None, None, reason)
