"""Original against pruned or an exit: same export, runtime, work and machine, or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from shortstack.devices.measurement import Measurement, Trial
from shortstack.devices.report.data import ORIGINAL, PRUNED, Entry
from shortstack.devices.stats import Interval, median, paired_ratio_interval, ratio_interval


@dataclass(frozen=True)
class Comparison:
    """How much faster and smaller the pruned artifact is. Ratios above one: pruned is better.

    `reason` says why there are no speed figures, where there are none.
    """

    spec: str
    runtime: str
    decode_speedup: Interval | None = None
    prefill_speedup: Interval | None = None
    bytes_ratio: float | None = None
    """Weight bytes that a decoded token reads, original over pruned: the speed-up to hope for."""
    size_ratio: float | None = None
    peak_ratio: float | None = None
    """Peak resident memory, original over pruned; medians of the memory trials."""
    paired: bool = False
    reason: str | None = None
    label: str = PRUNED
    """What the original is compared with: pruned, or an exit."""

    @property
    def gain_over_bytes(self) -> Interval | None:
        """Speed-up over bytes ratio; 1 means that all of the saved reading became speed."""
        speedup, ideal = self.decode_speedup, self.bytes_ratio
        if speedup is None or ideal is None:
            return None
        scaled = (speedup.estimate / ideal, speedup.low / ideal, speedup.high / ideal)
        return Interval(*scaled, speedup.n, speedup.confidence)


def speedups(entries: Sequence[Entry]) -> list[Comparison]:
    """Pair the original's entry with each other one of an export and runtime, in order of
    appearance."""
    sides: dict[tuple[str, str], dict[str, Entry]] = {}
    for entry in entries:
        sides.setdefault(entry.group, {})[entry.label] = entry
    return [
        dataclasses.replace(_compare(side[ORIGINAL], entry), label=label)
        for side in sides.values()
        for label, entry in side.items()
        if ORIGINAL in side and label != ORIGINAL
    ]


def _compare(original: Entry, pruned: Entry) -> Comparison:
    spec, runtime = original.group
    bytes_ratio = _artifact_ratio(original, pruned, "weight_bytes_per_token")
    size_ratio = _artifact_ratio(original, pruned, "size_bytes")
    a, b = original.measurement, pruned.measurement
    reason = why_unlike(a, b)
    if a is None or b is None or reason is not None:
        return Comparison(
            spec, runtime, bytes_ratio=bytes_ratio, size_ratio=size_ratio, reason=reason
        )
    rounds = sorted(rounds_in_turn(a.trials, b.trials))
    paired = len(rounds) == len(a.trials) == len(b.trials)
    return Comparison(
        spec,
        runtime,
        _ratio(b, a, rounds if paired else None, lambda t: t.decode_tokens_per_s),
        _ratio(b, a, rounds if paired else None, lambda t: 1 / t.prefill_s),
        bytes_ratio,
        size_ratio,
        _peak_ratio(a, b),
        paired,
    )


def why_unlike(a: Measurement | None, b: Measurement | None) -> str | None:
    """Why two measurements must not be compared; None if they may be."""
    if a is None or b is None:
        return "not measured on both sides"
    for side in (a, b):
        if not side.trials:
            return f"{side.label} failed" if side.failure else f"{side.label} has no timed trial"
    pairs = {
        "workload": (a.workload, b.workload),
        "prompt": (a.prompt_sha256, b.prompt_sha256),
        "machine": (a.host.get("cpu"), b.host.get("cpu")),
        "device": (a.device, b.device),
        "options": (a.options, b.options),
        "protocol": (a.protocol, b.protocol),
        "runtime version": (a.runtime_info.get("version"), b.runtime_info.get("version")),
    }
    unlike = [name for name, (one, other) in pairs.items() if one != other]
    return f"measured under another {', '.join(unlike)}" if unlike else None


class Turn(Protocol):
    """What says of a trial when it ran: one in memory or one of a record."""

    @property
    def round(self) -> int: ...

    @property
    def conditions(self) -> Mapping[str, Any]: ...


def rounds_in_turn(a: Iterable[Turn], b: Iterable[Turn]) -> set[int]:
    """Rounds that both sides ran in one sitting: with hours between them nothing is paired."""
    mine, theirs = ({t.round: t.conditions.get("sitting", 0) for t in side} for side in (a, b))
    return {number for number, sitting in mine.items() if theirs.get(number) == sitting}


def peak_bytes(measurement: Measurement | None) -> float | None:
    """Median over memory trials of the peak of resident memory."""
    if measurement is None or not measurement.memory:
        return None
    return median([m.peak_total_bytes for m in measurement.memory])


def _ratio(
    above: Measurement,
    below: Measurement,
    rounds: Sequence[int] | None,
    figure: Callable[[Trial], float],
) -> Interval:
    if rounds is None:
        return ratio_interval([figure(t) for t in above.trials], [figure(t) for t in below.trials])
    tops, bottoms = ({t.round: figure(t) for t in m.trials} for m in (above, below))
    return paired_ratio_interval([tops[r] for r in rounds], [bottoms[r] for r in rounds])


def _artifact_ratio(original: Entry, pruned: Entry, key: str) -> float | None:
    if original.artifact is None or pruned.artifact is None:
        return None
    return float(original.artifact[key] / pruned.artifact[key])


def _peak_ratio(a: Measurement, b: Measurement) -> float | None:
    above, below = peak_bytes(a), peak_bytes(b)
    return above / below if above and below else None
