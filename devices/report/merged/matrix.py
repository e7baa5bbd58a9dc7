"""One artifact across all places, side by side; what may not stand there says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shortstack.devices.report.merged.cases import Case, Shape
from shortstack.devices.report.merged.machines import Place
from shortstack.devices.report.merged.unlike import not_comparable, why_unlike
from shortstack.devices.report.view import NOT_TIMED, with_interval


@dataclass(frozen=True)
class Row:
    """Cases that carry one name, runtime and shape. `reference`: most others are like it."""

    title: str
    runtime: str
    shape: Shape
    cases: tuple[Case, ...]
    reference: Case

    def reasons(self, case: Case) -> list[str]:
        """Why not to compare its figures; none for a case that has no figures."""
        return why_unlike(case, self.reference) if case.measurement.trials else []

    def cell(self, place: Place) -> str | None:
        """Decode speed at a place, each run's; None where it was not measured there."""
        told = [self._told(case) for case in self.cases if case.place == place]
        return "; ".join(told) if told else None

    def _told(self, case: Case) -> str:
        if not case.measurement.trials:
            return "failed" if case.measurement.failure else NOT_TIMED
        if reasons := self.reasons(case):
            return not_comparable(reasons)
        return with_interval(case.decode_tokens_per_s)


def rows(cases: Sequence[Case]) -> list[Row]:
    """Group by what the artifact is called, so that two files of one name meet and are marked.

    One file under two labels is one artifact. Two files of one name at one place are two.
    """
    label_of: dict[str, str] = {}
    groups: dict[tuple[object, ...], list[Case]] = {}
    for case in cases:
        label = label_of.setdefault(case.sha256, case.label)
        key: tuple[object, ...] = (label, case.export, case.n_layers, case.runtime, case.shape)
        taken = [c for c in groups.get(key, ()) if c.place == case.place]
        if any(c.sha256 != case.sha256 for c in taken):
            key = (*key, case.sha256)
        groups.setdefault(key, []).append(case)
    return [_row(group) for group in groups.values()]


def _row(group: Sequence[Case]) -> Row:
    # A failed case may lack what the runtime says of itself: it is no measure for the others.
    able = [c for c in group if c.measurement.trials] or list(group)
    reference = max(able, key=lambda a: sum(not why_unlike(b, a) for b in able))
    first = reference
    return Row(first.title, first.runtime, first.shape, tuple(group), reference)
