"""Which of the machines would hold a model that was not run on it: computed, and marked so."""

from __future__ import annotations

from collections.abc import Sequence

from shortstack.devices.report.merged.cases import Case
from shortstack.devices.report.merged.tables import PROJECTED
from shortstack.devices.report.view import NONE, Table, megabytes
from shortstack.devices.roofline.places import Place, Seat, places
from shortstack.devices.roofline.share import device_kind


def would_hold(cases: Sequence[Case]) -> Table:
    """Every artifact on every device that another of these cases ran on."""
    runs = [(case.measurement.model_dump(by_alias=True), _seat(case)) for case in cases]
    case_of = {id(record): case for (record, _), case in zip(runs, cases, strict=True)}
    rows = tuple(
        (
            case_of[id(found.source)].title,
            found.target.runtime,
            found.seat.name,
            f"{found.target.context_tokens} tokens",
            _said(found),
            megabytes(found.fit.need_bytes if found.fit else None),
            megabytes(found.seat.have_bytes),
            megabytes(found.fit.headroom_bytes if found.fit else None),
        )
        for found in places(runs)
    )
    columns = (
        *("Model", "Runtime", "Device", "Context", "Would fit"),
        *("Needs, MB, projected", "There is, MB", "Stays free, MB"),
    )
    caption = f"{PROJECTED}: which of the machines would hold what was not run on them"
    return Table(caption, columns, rows, 5)


def _seat(case: Case) -> Seat:
    place = case.place
    return Seat(place.name, device_kind(place.device), place.memory_bytes)


def _said(found: Place) -> str:
    if found.fit is None:
        return f"not known: {found.reason}" if found.reason else NONE
    return "yes" if found.fit.fits else "no"
