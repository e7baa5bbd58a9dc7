"""Records put together: every case with its place, run and quality; nothing is shown yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shortstack.devices.records import Record
from shortstack.devices.report.merged.cases import Case
from shortstack.devices.report.merged.machines import Machine, Places
from shortstack.devices.report.merged.quality import Quality, Verdict, qualities
from shortstack.devices.report.merged.roof import ShareOf
from shortstack.errors import ShortstackError


@dataclass(frozen=True)
class Projected:
    """A prediction for a device that is not at hand. Shown apart from what was measured."""

    artifact: str
    runtime: str
    work: str
    device: str
    decode_tokens_per_s: float
    low_tokens_per_s: float | None
    """With `high`: what the error below leaves; None where it is not known."""
    high_tokens_per_s: float | None
    error: str
    """What the same model is off by on devices that were measured, or why that is not known."""
    need_bytes: float | None
    fits: tuple[tuple[float, bool], ...]
    """For each memory size (bytes) that the device is sold with."""
    basis: str
    """Which records it was fitted on."""
    notes: tuple[str, ...] = ()
    """What a reader must know of it: extrapolated, another basis, the error of the memory."""


@dataclass(frozen=True)
class Merged:
    """Everything that the tables and charts are drawn from."""

    records: tuple[Record, ...]
    machines: tuple[Machine, ...]
    cases: tuple[Case, ...]
    quality: Quality | None
    """What quality is told by; None where no record and no evaluation tells it."""
    projected: tuple[Projected, ...] = ()
    share_of: ShareOf | None = None

    @property
    def measured(self) -> tuple[Case, ...]:
        """Cases with timed trials."""
        return tuple(case for case in self.cases if case.measurement.trials)

    def verdict(self, case: Case) -> Verdict | None:
        return None if self.quality is None else self.quality.of(case)


def merge(
    records: Sequence[Record],
    evaluations: Sequence[tuple[str, object]] = (),
    projected: Sequence[Projected] = (),
    share_of: ShareOf | None = None,
) -> Merged:
    """Number the runs, name the machines, look up the quality of every artifact.

    `evaluations`: (name, content) of eval.json files. `share_of` computes shares of the roofline;
    without it the report has none. Raises ShortstackError where nothing was
    measured and for an evaluation of another schema.
    """
    places = Places(records)
    cases = tuple(
        Case(record, m, places.place(record, m.device), run)
        for run, record in enumerate(records, 1)
        for m in record.measurements
    )
    if not cases:
        raise ShortstackError(
            "these records hold no measurement. Run: shortstack bench MODEL -o DIR"
        )
    quality = qualities(cases, records, evaluations)
    machines = tuple(places.machines)
    return Merged(tuple(records), machines, cases, quality, tuple(projected), share_of)
