"""What a reader must know before trusting a measurement: drawn from its samples, never stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shortstack.devices.measurement import Measurement, Trial

NOISY_SPREAD = 0.05
BUSY_SHARE = 0.10
DRIFT = 0.05
SHORT_WINDOW_S = 0.05
"""Below it the clock, the interpreter and one time slice of another process weigh too much."""
SURE_REPEATS = 6
"""From so many on, the range of the rounds covers the median with at least 95 %."""


def flags(measurement: Measurement) -> Iterator[str]:
    """Each flag is `word: fact`; the word is for programs."""
    if measurement.trials:
        yield from _rounds(measurement)
        yield from _speed(measurement)
        yield from _trials(measurement.trials)
        yield from _device(measurement)


def _rounds(measurement: Measurement) -> Iterator[str]:
    done, wanted = len(measurement.trials), measurement.workload.repeats
    if done < wanted:
        yield f"only {done} of {wanted} trials"
        if measurement.failure is None and measurement.workload.time_budget_s is not None:
            yield f"time budget: it ended after {done} of {wanted} rounds"
    if wanted < SURE_REPEATS:
        yield (
            f"few repeats: intervals of {wanted} rounds are their range and cover less than 95 %"
        )


def _speed(measurement: Measurement) -> Iterator[str]:
    from shortstack.devices.stats import drift, median, spread

    decode_s = [sum(steps) for steps in measurement.decode_step_s]
    for phase, rates, seconds in (
        ("decode", measurement.decode_tokens_per_s, decode_s),
        ("prefill", measurement.prefill_tokens_per_s, measurement.prefill_s),
    ):
        if len(rates) > 1 and (cv := spread(rates)) > NOISY_SPREAD:
            yield f"noisy: {phase} speed varies by {100 * cv:.0f} % between trials"
        moved = drift(rates)
        if moved is not None and abs(moved) > DRIFT:
            yield f"drift: the last trials {phase} {100 * moved:+.0f} % against the first"
        if (window_s := median(seconds)) < SHORT_WINDOW_S:
            yield f"short window: {phase} is timed for {1000 * window_s:.0f} ms a trial"


def _trials(trials: tuple[Trial, ...]) -> Iterator[str]:
    shares = [s for t in trials if (s := t.conditions.get("foreign_cpu_share")) is not None]
    if shares and max(shares) > BUSY_SHARE:
        yield f"busy: other processes took up to {100 * max(shares):.0f} % of the CPU"
    if len({t.output_sha256 for t in trials}) > 1:
        yield "unsteady: greedy decoding gave other tokens in other trials"
    cold = sum(t.warmup.get("steady") is False for t in trials)
    if cold:
        yield f"warm-up: not steady at its end in {cold} of {len(trials)} trials"
    sittings = {t.conditions.get("sitting", 0) for t in trials}
    if len(sittings) > 1:
        yield f"resumed: the trials come from {len(sittings)} sittings"
    elif sittings != {0}:
        yield "resumed: the trials come from a later sitting than the campaign's first"


def _device(measurement: Measurement) -> Iterator[str]:
    """What the sensors and counters of the device say, each thing once."""
    from shortstack.devices import conditions, energy

    found = [
        flag
        for t in measurement.trials
        for flag in conditions.flags(t.device_before, t.device_after)
    ]
    yield from dict.fromkeys([*found, *energy.flags(measurement.energy)])
