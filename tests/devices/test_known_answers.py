"""Known times, known memory, known deaths through the real harness and real child processes: the
figures are right within two per cent, and the record says what happened."""

from __future__ import annotations

import dataclasses
import sys
import time

import pytest

from shortstack.devices.harness import measure
from shortstack.devices.protocol import Protocol
from shortstack.devices.stats import median
from shortstack.devices.workload import Prompt, Workload

from .conftest import MakeCase
from .fake_session import (
    ALLOCATED,
    DECODE_S,
    LOAD_S,
    LONG_DECODE_S,
    LONG_LOAD_S,
    LONG_PREFILL_S,
    PREFILL_S,
)

CLOSE = 0.02


def test_known_times_come_back_within_two_per_cent(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt
) -> None:
    work = dataclasses.replace(workload, decode_tokens=3, repeats=2)
    case = make_case("long sleeper")
    (measured,) = measure([case], work, prompt, protocol=Protocol(opener=opener))
    assert measured.failure is None
    assert median(measured.load_s) == pytest.approx(LONG_LOAD_S, rel=CLOSE)
    assert median(measured.prefill_s) == pytest.approx(LONG_PREFILL_S, rel=CLOSE)
    assert median(measured.ttft_s) == pytest.approx(LONG_PREFILL_S, rel=CLOSE)
    assert median(measured.decode_tokens_per_s) == pytest.approx(1 / LONG_DECODE_S, rel=CLOSE)
    assert median(measured.prefill_tokens_per_s) == pytest.approx(4 / LONG_PREFILL_S, rel=CLOSE)


def test_every_phase_takes_at_least_its_known_time(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt
) -> None:
    (measured,) = measure(
        [make_case("sleeper")], workload, prompt, protocol=Protocol(opener=opener)
    )
    assert measured.failure is None
    assert len(measured.trials) == 2
    assert min(measured.load_s) >= LOAD_S
    assert min(measured.prefill_s) >= PREFILL_S
    for trial in measured.trials:
        assert trial.ttft_s >= trial.prefill_s
        assert len(trial.decode_step_s) == 5
        assert min(trial.decode_step_s) >= DECODE_S
        assert trial.decode_tokens_per_s <= 1 / DECODE_S
    assert measured.runtime_info["threads"] == 1
    assert not any("unsteady" in flag for flag in measured.flags)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the two kinds apart")
def test_anonymous_and_file_backed_memory_are_told_apart(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt
) -> None:
    mapped = 200_000_000
    case = make_case("hoarder", size=mapped)
    only_memory = dataclasses.replace(workload, memory_repeats=1, repeats=1)
    (measured,) = measure([case], only_memory, prompt, protocol=Protocol(opener=opener))
    assert measured.failure is None
    (trial,) = measured.memory
    base, load, prefill = trial.baseline, trial.phases["load"], trial.phases["prefill"]
    assert base["anon_bytes"] is not None
    assert base["file_bytes"] is not None
    assert trial.peak_anon_bytes is not None
    assert trial.peak_file_bytes is not None
    anon, file = (
        trial.peak_anon_bytes - base["anon_bytes"],
        trial.peak_file_bytes - base["file_bytes"],
    )
    assert anon == pytest.approx(ALLOCATED, rel=CLOSE)
    assert file == pytest.approx(mapped, rel=CLOSE)
    total = trial.peak_total_bytes - (base["total_bytes"] or 0)
    assert total == pytest.approx(ALLOCATED + mapped, rel=CLOSE)
    # The file is mapped while loading, the array made while prefilling: neither leaks over.
    loaded = (load["peak"]["file_bytes"] or 0) - base["file_bytes"]
    assert loaded == pytest.approx(mapped, rel=CLOSE)
    assert (load["peak"]["anon_bytes"] or 0) - base["anon_bytes"] <= CLOSE * ALLOCATED
    prefilled = (prefill["peak"]["anon_bytes"] or 0) - base["anon_bytes"]
    assert prefilled == pytest.approx(ALLOCATED, rel=CLOSE)
    assert "VmHWM" in trial.method


@pytest.mark.parametrize(
    ("runtime", "kind", "signal_name", "phase", "words"),
    [
        ("crasher", "signal", "SIGSEGV", "warm-up", "died of signal SIGSEGV"),
        ("late crasher", "signal", "SIGSEGV", "run", "died of signal SIGSEGV"),
        ("thrower", "exit", None, "warm-up", "kernel says no"),
        ("refuser", "error", None, "load", "not a model"),
        ("nothing", "exit", None, "load", "KeyError"),
    ],
)
def test_a_runtime_that_fails_is_a_record_and_the_others_go_on(
    opener: str,
    make_case: MakeCase,
    workload: Workload,
    prompt: Prompt,
    runtime: str,
    kind: str,
    signal_name: str | None,
    phase: str,
    words: str,
) -> None:
    cases = [make_case(runtime), make_case("instant", "pruned")]
    failed, fine = measure(cases, workload, prompt, protocol=Protocol(opener=opener))
    assert failed.failure is not None
    assert failed.trials == ()
    assert (failed.failure.kind, failed.failure.signal_name) == (kind, signal_name)
    assert failed.failure.phase == phase
    assert words in failed.failure.message
    assert "\n" not in failed.failure.message
    assert fine.failure is None
    assert len(fine.trials) == workload.repeats


def test_a_runtime_that_hangs_is_killed_and_recorded(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt
) -> None:
    begun = time.monotonic()
    (hung,) = measure(
        [make_case("hanger")], workload, prompt, protocol=Protocol(opener=opener, timeout_s=5)
    )
    assert time.monotonic() - begun >= 5
    assert hung.failure is not None
    assert hung.failure.kind == "timeout"
    assert hung.failure.phase == "warm-up"
    assert "5 s" in hung.failure.message


def test_a_runtime_that_prints_json_does_not_confuse_the_record(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt
) -> None:
    (measured,) = measure(
        [make_case("babbler")], workload, prompt, protocol=Protocol(opener=opener)
    )
    assert measured.failure is None
    assert len(measured.trials) == workload.repeats
    assert all(len(trial.decode_step_s) == workload.decode_tokens for trial in measured.trials)


def test_what_was_measured_before_a_death_is_kept(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt
) -> None:
    work = dataclasses.replace(workload, memory_repeats=1)
    case = make_case("dies when timed")
    (measured,) = measure([case], work, prompt, protocol=Protocol(opener=opener))
    assert len(measured.memory) == 1
    assert measured.trials == ()
    assert measured.failure is not None
    assert (measured.failure.kind, measured.failure.round) == ("signal", 0)


def test_depth_is_filled_before_the_clock_starts(
    opener: str, make_case: MakeCase, workload: Workload
) -> None:
    """The fake takes its time for the depth and again for the prompt: one of them is counted."""
    work = dataclasses.replace(workload, depth_tokens=3, repeats=1)
    prompt = Prompt(tuple(range(1, 8)), "seven numbers")
    (measured,) = measure([make_case("sleeper")], work, prompt, protocol=Protocol(opener=opener))
    assert measured.failure is None
    assert PREFILL_S <= measured.prefill_s[0] < 1.9 * PREFILL_S


def test_a_batch_counts_the_tokens_of_all_its_rows(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt
) -> None:
    work = dataclasses.replace(workload, batch=5)
    (measured,) = measure([make_case("rows")], work, prompt, protocol=Protocol(opener=opener))
    assert measured.failure is None
    assert median(measured.prefill_tokens_per_s) == pytest.approx(4 * 5 / 0.2, rel=0.1)
    (rate, *_), (trial, *_) = measured.decode_tokens_per_s, measured.trials
    assert rate == pytest.approx(5 * trial.decode_tokens_per_s)


def test_a_batch_that_a_session_cannot_run_is_a_failure_that_says_so(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt
) -> None:
    work = dataclasses.replace(workload, batch=2)
    (measured,) = measure([make_case("instant")], work, prompt, protocol=Protocol(opener=opener))
    assert measured.failure is not None
    assert "one sequence at a time" in measured.failure.message


def test_warm_up_goes_on_until_steps_are_alike(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt
) -> None:
    work = dataclasses.replace(workload, warmup_decode_tokens=40, repeats=1)
    protocol = Protocol(opener=opener)
    settled, wandering = measure(
        [make_case("settler"), make_case("wanderer", "pruned")], work, prompt, protocol=protocol
    )
    (trial,) = settled.trials
    assert trial.warmup["steady"] is True
    assert 8 < trial.warmup["steps"] < 40
    assert len(trial.warmup["decode_step_s"]) == trial.warmup["steps"]
    (restless,) = wandering.trials
    assert restless.warmup["steady"] is False
    assert restless.warmup["steps"] == 40
    assert any(flag.startswith("warm-up: not steady") for flag in wandering.flags)


def test_records_hold_no_folders(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt
) -> None:
    (measured,) = measure(
        [make_case("pathological")], workload, prompt, protocol=Protocol(opener=opener)
    )
    assert measured.failure is not None
    assert "/" not in measured.failure.message
    assert "original.gguf.Q8_0" in measured.failure.message
