"""Flags follow the samples: a steady machine has none, a loaded one is called noisy."""

from __future__ import annotations

import dataclasses
import random

import pytest

from shortstack.devices.measurement import Failure, Measurement, Trial
from shortstack.devices.workload import Prompt, Workload

from .conftest import MakeCase

QUIET_SPREAD, LOADED_SPREAD = 0.01, 0.15


def trials(rates: list[float], steps: int = 32) -> tuple[Trial, ...]:
    """Trials that decode at these many tokens/s."""
    return tuple(
        Trial(
            round=n,
            position=n,
            started_s=float(n),
            load_s=0.1,
            prefill_s=0.2,
            ttft_s=0.21,
            decode_step_s=(1 / rate,) * steps,
            output_sha256="c" * 64,
            conditions={"foreign_cpu_share": 0.0},
        )
        for n, rate in enumerate(rates)
    )


def changed(trial: Trial, **fields: object) -> Trial:
    return dataclasses.replace(trial, **fields)  # type: ignore[arg-type]  # fields of a Trial


@pytest.fixture
def quiet(make_case: MakeCase, workload: Workload, prompt: Prompt) -> Measurement:
    """Twelve trials of a machine that has nothing else to do."""
    rng = random.Random(1)
    rates = [50 * rng.gauss(1, QUIET_SPREAD) for _ in range(12)]
    case = make_case("instant")
    return Measurement(
        label=case.label,
        runtime=case.runtime,
        artifact=case.artifact,
        workload=dataclasses.replace(workload, repeats=12),
        prompt_sha256=prompt.sha256,
        prompt_source=prompt.source,
        host={},
        protocol={},
        trials=trials(rates),
    )


def words(measurement: Measurement) -> list[str]:
    return [flag.split(":")[0] for flag in measurement.flags]


def with_rates(measurement: Measurement, rates: list[float]) -> Measurement:
    return dataclasses.replace(measurement, trials=trials(rates))


def test_a_quiet_machine_has_no_flag(quiet: Measurement) -> None:
    assert quiet.flags == ()


@pytest.mark.parametrize("seed", range(20))
def test_a_loaded_machine_is_called_noisy(quiet: Measurement, seed: int) -> None:
    """Another process takes up to half of the machine now and then, as a synthetic load does."""
    rng = random.Random(seed)
    rates = [50 * rng.choice([1.0, 1.0, 0.75, 0.5]) * rng.gauss(1, 0.01) for _ in range(12)]
    assert "noisy" in words(with_rates(quiet, rates))


@pytest.mark.parametrize("seed", range(20))
def test_normal_spread_is_not_called_noisy(quiet: Measurement, seed: int) -> None:
    rng = random.Random(seed)
    rates = [50 * rng.gauss(1, QUIET_SPREAD) for _ in range(12)]
    assert "noisy" not in words(with_rates(quiet, rates))


def test_a_machine_that_slows_down_is_told(quiet: Measurement) -> None:
    drifting = with_rates(quiet, [50 - 0.45 * n for n in range(12)])
    (flag,) = [flag for flag in drifting.flags if flag.startswith("drift")]
    assert "-6 %" in flag


def test_prefill_is_held_to_the_same_as_decode(quiet: Measurement) -> None:
    def with_prefill(seconds: list[float]) -> tuple[str, ...]:
        made = [changed(t, prefill_s=s) for t, s in zip(quiet.trials, seconds, strict=True)]
        return dataclasses.replace(quiet, trials=tuple(made)).flags

    assert with_prefill([0.2, 0.25] * 6) == ("noisy: prefill speed varies by 12 % between trials",)
    (drift,) = with_prefill([0.2 * 1.01**n for n in range(12)])
    assert drift.startswith("drift: the last trials prefill -6 %")
    short = "short window: prefill is timed for 4 ms a trial"
    assert with_prefill([0.004] * 12) == (short,)


def test_each_doubt_has_its_flag(quiet: Measurement) -> None:
    first, *rest = quiet.trials
    doubts = {
        "busy": changed(first, conditions={"foreign_cpu_share": 0.4}),
        "unsteady": changed(first, output_sha256="d" * 64),
        "warm-up": changed(first, warmup={"steps": 64, "steady": False}),
        "resumed": changed(first, conditions={"sitting": 1}),
        "on battery": changed(first, device_after={"on_battery": True}),
        "throttled": changed(first, device_after={"throttle_reasons": ["thermal slowdown"]}),
        "foreign process": changed(first, device_before={"other_processes": 2}),
    }
    for word, trial in doubts.items():
        assert words(dataclasses.replace(quiet, trials=(trial, *rest))) == [word]


def test_trials_of_a_later_sitting_alone_are_told(quiet: Measurement) -> None:
    late = tuple(changed(t, conditions={"sitting": 1}) for t in quiet.trials)
    assert words(dataclasses.replace(quiet, trials=late)) == ["resumed"]


def test_reasons_that_slow_nothing_down_are_no_throttling(quiet: Measurement) -> None:
    first, *rest = quiet.trials
    idle = changed(first, device_before={"throttle_reasons": ["idle"]})
    assert dataclasses.replace(quiet, trials=(idle, *rest)).flags == ()


def test_a_window_too_short_for_the_clock_is_told(quiet: Measurement) -> None:
    short = dataclasses.replace(quiet, trials=trials([5000.0] * 12, steps=8))
    assert words(short) == ["short window"]


def test_trials_that_are_missing_are_told_with_the_reason(quiet: Measurement) -> None:
    cut = dataclasses.replace(quiet, trials=quiet.trials[:8])
    assert words(cut) == ["only 8 of 12 trials"]
    late = dataclasses.replace(cut, workload=dataclasses.replace(cut.workload, time_budget_s=9.0))
    assert words(late) == ["only 8 of 12 trials", "time budget"]
    dead = dataclasses.replace(late, failure=Failure("timeout", "hung", "run"))
    assert words(dead) == ["only 8 of 12 trials"]


def test_few_repeats_are_told(quiet: Measurement) -> None:
    few = dataclasses.replace(
        quiet,
        trials=quiet.trials[:3],
        workload=dataclasses.replace(quiet.workload, repeats=3),
    )
    assert words(few) == ["few repeats"]
