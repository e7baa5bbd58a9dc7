"""Shares of the roofline beside the figures, from whoever computes them (docs/roofline.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from shortstack.devices.report.merged.cases import Case
from shortstack.devices.report.view import NONE, Table, percent
from shortstack.devices.stats import Interval

COARSE = 0.1
"""From this share on, whole per cents tell enough."""


class ShareLike(Protocol):
    """What of a ceiling was reached; without a `share` the `reason`."""

    @property
    def share(self) -> Interval | None: ...
    @property
    def unit(self) -> str: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def notes(self) -> Sequence[str]: ...


ShareOf = Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[ShareLike, ShareLike]]
"""A measurement and the ceilings of its run, as in bench.json, to shares of decode and prefill."""


def roofline(cases: Sequence[Case], share_of: ShareOf) -> Table:
    """Nothing is clamped: more than 100 % is shown, with what it may mean."""
    rows = []
    for case in cases:
        record = case.measurement.model_dump(by_alias=True)
        decode, prefill = share_of(record, case.record.ceilings)
        if decode.share is None and prefill.share is None and not case.record.ceilings:
            continue  # a run that measured no ceiling has no line of reasons, a line each
        notes = dict.fromkeys((*decode.notes, *prefill.notes))
        rows.append(
            (
                case.title,
                case.runtime,
                case.place.name,
                case.shape.words,
                _said(decode),
                f"{_said(prefill)}" + (f" of {prefill.unit}" if prefill.share else ""),
                "; ".join(notes) or NONE,
            )
        )
    columns = (
        *("Model", "Runtime", "Device", "Work", "Decode, of the bandwidth"),
        *("Prefill, of the matrix products", "Notes"),
    )
    return Table("Share of what the device allows", columns, tuple(rows), 7)


def _said(found: ShareLike) -> str:
    if found.share is None:
        return found.reason or NONE
    s = found.share
    digits = 0 if s.estimate >= COARSE else 1
    low, high = (f"{100 * end:.{digits}f}" for end in (s.low, s.high))
    return f"{percent(s, digits)} ({low} to {high})"
