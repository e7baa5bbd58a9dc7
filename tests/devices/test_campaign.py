"""A campaign goes on after a kill, stops at its budget, cools down, and tells how it goes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from shortstack.devices import energy as counters
from shortstack.devices import harness, worker
from shortstack.devices.harness import measure
from shortstack.devices.journal import Journal
from shortstack.devices.measurement import Measurement
from shortstack.devices.pace import Pace, in_words
from shortstack.devices.protocol import Protocol
from shortstack.devices.workload import Prompt, Workload
from shortstack.errors import ShortstackError

from . import fake_session
from .conftest import MakeCase


class Kill:
    """Hears one line a trial; interrupts after `count` of them."""

    def __init__(self, count: int) -> None:
        self.count, self.lines = count, list[str]()

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        if len(self.lines) == self.count:
            raise KeyboardInterrupt


def test_a_killed_campaign_goes_on_with_what_it_has(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt, tmp_path: Path
) -> None:
    cases = [make_case("instant"), make_case("instant", "pruned")]
    file, protocol = tmp_path / "trials.jsonl", Protocol(opener=opener)
    with pytest.raises(KeyboardInterrupt):
        measure(cases, workload, prompt, protocol=protocol, journal=Journal(file), tell=Kill(2))
    before = file.read_text(encoding="utf-8").splitlines()
    with file.open("a", encoding="utf-8") as stream:
        stream.write('{"trial": ["timing", 1')  # a kill in mid-write
    heard = Kill(99)
    measured = measure(
        cases, workload, prompt, protocol=protocol, journal=Journal(file), tell=heard
    )
    assert len(heard.lines) == 2
    assert all(len(m.trials) == 2 for m in measured)
    assert file.read_text(encoding="utf-8").splitlines()[: len(before)] == before
    first = json.loads(before[1])["outcome"]
    kept = [t for m in measured for t in m.trials if t.started_s == first["started_s"]]
    assert [t.load_s for t in kept] == [first["answer"]["load_s"]]
    assert {t.conditions["sitting"] for m in measured for t in m.trials} == {0, 1}
    assert any(flag.startswith("resumed") for m in measured for flag in m.flags)
    starts = sorted(t.started_s for m in measured for t in m.trials)
    assert len(set(starts)) == 4
    again = measure(cases, workload, prompt, protocol=protocol, journal=Journal(file))
    assert again == measured


def test_a_failure_is_kept_like_a_trial(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt, tmp_path: Path
) -> None:
    file, protocol = tmp_path / "trials.jsonl", Protocol(opener=opener)
    for lines in (1, 0):
        heard = Kill(99)
        (dead,) = measure(
            [make_case("crasher")],
            workload,
            prompt,
            protocol=protocol,
            journal=Journal(file),
            tell=heard,
        )
        assert dead.failure is not None
        assert dead.failure.signal_name == "SIGSEGV"
        assert len(heard.lines) == lines


@pytest.mark.parametrize("damage", ["nonsense\n", "[]\n", '{"trial": 3}\n', '{"other": 1}\n'])
def test_a_damaged_journal_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    file.write_text(damage, encoding="utf-8")
    with pytest.raises(ShortstackError, match="damaged") as caught:
        Journal(file)
    assert "\n" not in str(caught.value)


def test_the_budget_ends_a_campaign_between_rounds(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt
) -> None:
    work = dataclasses.replace(workload, repeats=5, memory_repeats=3, time_budget_s=0.0)
    cases = [make_case("instant"), make_case("instant", "pruned")]
    for measured in measure(cases, work, prompt, protocol=Protocol(opener=opener)):
        assert len(measured.trials) == 1
        assert measured.memory == ()
        assert any(flag.startswith("time budget") for flag in measured.flags)


def test_a_pause_is_made_before_each_trial(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt
) -> None:
    work = dataclasses.replace(workload, cooldown_s=0.5)
    begun = time.perf_counter()
    (measured,) = measure([make_case("instant")], work, prompt, protocol=Protocol(opener=opener))
    assert time.perf_counter() - begun >= 2 * 0.5
    assert measured.workload.cooldown_s == 0.5


def test_every_second_load_is_cold_where_the_system_can(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt
) -> None:
    work = dataclasses.replace(workload, repeats=3)
    protocol = Protocol(opener=opener, cold=True)
    (measured,) = measure([make_case("instant", size=1 << 20)], work, prompt, protocol=protocol)
    warm, cold, again = measured.trials
    assert warm.load_kind == again.load_kind == "warm"
    assert cold.load_kind == "cold" or cold.conditions["why_not_cold"]


def test_cases_with_their_own_workload_and_prompt_run_them(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt
) -> None:
    longer = dataclasses.replace(workload, prompt_tokens=6)
    numbers = Prompt((1, 2, 3, 4, 5, 6), "six numbers")
    case = make_case("instant")
    cases = [
        dataclasses.replace(case, workload=workload, prompt=prompt),
        dataclasses.replace(case, workload=longer, prompt=numbers),
    ]
    short, long = measure(cases, workload, prompt, protocol=Protocol(opener=opener))
    assert (short.workload.prompt_tokens, long.workload.prompt_tokens) == (4, 6)
    assert (short.prompt_sha256, long.prompt_sha256) == (prompt.sha256, numbers.sha256)


def test_the_options_of_the_runtime_are_in_the_record(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt
) -> None:
    asked = (("gpu_layers", "20"), ("kv_type", "q8_0"))
    cases = [
        dataclasses.replace(make_case("instant"), options=asked),
        make_case("instant", "pruned"),
    ]
    given, default = measure(cases, workload, prompt, protocol=Protocol(opener=opener))
    assert given.to_dict()["options"] == dict(asked)
    assert Measurement.from_dict(given.to_dict()).options == dict(asked)
    assert default.options == {}


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt
) -> None:
    case = make_case("instant")
    huge = dataclasses.replace(case.artifact, size_bytes=10**15)
    cases = [dataclasses.replace(case, artifact=huge), make_case("instant", "pruned")]
    refused, fine = measure(cases, workload, prompt, protocol=Protocol(opener=opener))
    assert refused.failure is not None
    assert (refused.failure.kind, refused.failure.phase) == ("error", "start")
    assert "needs at least 1,000,000.00 GB" in refused.failure.message
    assert "cpu has" in refused.failure.message
    assert fine.failure is None


def test_each_trial_is_told_in_one_line_with_the_time_left(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt
) -> None:
    heard = Kill(99)
    work = dataclasses.replace(workload, memory_repeats=1)
    cases = [make_case("instant"), make_case("crasher", "pruned")]
    measure(cases, work, prompt, protocol=Protocol(opener=opener), tell=heard)
    assert len(heard.lines) == 1 + 2 + 1  # what is dead is not tried again
    assert all(line.count("\n") == 0 and "left" in line for line in heard.lines)
    assert sum("FAILED" in line for line in heard.lines) == 1
    assert sum("decode" in line for line in heard.lines) == 2


def test_the_time_left_is_learnt_from_what_ran() -> None:
    pace = Pace()
    assert pace.left_s([("timing", 0)]) is None
    pace.add("memory", 0, 4.0)
    assert pace.left_s([("memory", 0), ("timing", 0), ("timing", 1)]) == 12.0
    pace.add("timing", 0, 10.0)
    assert pace.left_s([("timing", 0), ("timing", 1), ("memory", 1)]) == 24.0
    assert pace.left_s([]) == 0.0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "time left unknown"), (42.4, "42 s left"), (300, "5 min left"), (9000, "2.5 h left")],
)
def test_the_time_left_in_words(seconds: float | None, words: str) -> None:
    assert in_words(seconds) == words


def test_energy_without_a_counter_is_none_with_the_reason(
    opener: str,
    make_case: MakeCase,
    workload: Workload,
    prompt: Prompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(harness, "counters", lambda device: ([], [f"{device} has no counter"]))
    protocol = Protocol(opener=opener, energy=True)
    (measured,) = measure([make_case("instant")], workload, prompt, protocol=protocol)
    assert (measured.energy, measured.energy_reason) == ((), "cpu has no counter")
    (unasked,) = measure([make_case("instant")], workload, prompt, protocol=Protocol(opener=opener))
    assert (unasked.energy, unasked.energy_reason) == ((), "not asked for")


@pytest.mark.parametrize("batch", [1, 3])
def test_a_trial_for_energy_repeats_prefill_and_decode(
    batch: int, workload: Workload, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, with a counter that counts calls of the work."""
    ran: dict[str, list[int]] = {}

    session = fake_session.RowsGoBack(1) if batch > 1 else fake_session.GoesBack(1)

    def measured(device: str, works: dict[str, Callable[[], int]]) -> dict[str, object]:
        ran.update({phase: [work(), work()] for phase, work in works.items()})
        return {"energy": [], "energy_reason": None}

    monkeypatch.setattr(counters, "measured", measured)
    monkeypatch.setattr(worker, "_open", lambda request, work: session)
    work = dataclasses.replace(workload, batch=batch)
    request = {"workload": work.to_dict(), "tokens": list(prompt.tokens), "device": "cpu"}
    monkeypatch.setattr(worker, "_end_with_parent", lambda: None)
    told = worker.energy(request)
    assert told["energy_reason"] is None
    assert ran == {"prefill": [4 * batch] * 2, "decode": [5 * batch] * 2}
    assert set(session.kept) == {workload.input_tokens}


@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_without_the_prompt_is_not_passed_off_as_its_energy(
    batch: int, workload: Workload, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One session cannot go back, the other not with its rows."""
    session = fake_session.Rows(1) if batch > 1 else fake_session.KnownSession(1)
    ran: list[str] = []

    def measured(device: str, works: dict[str, Callable[[], int]]) -> dict[str, object]:
        ran.extend(works)
        return {"energy": [], "energy_reason": None}

    monkeypatch.setattr(counters, "measured", measured)
    monkeypatch.setattr(worker, "_open", lambda request, work: session)
    monkeypatch.setattr(worker, "_end_with_parent", lambda: None)
    work = dataclasses.replace(workload, batch=batch)
    request = {"workload": work.to_dict(), "tokens": list(prompt.tokens), "device": "cpu"}
    assert "cannot go back" in worker.energy(request)["energy_reason"]
    assert ran == ["prefill"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_trial_ends_with_its_campaign(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt
) -> None:
    """The campaign is killed while its trial hangs; nothing is left that could disturb the next."""
    request = {
        "path": str(make_case("hanger").artifact.path),
        "runtime": "hanger",
        "workload": workload.to_dict(),
        "tokens": list(prompt.tokens),
        "opener": opener,
        "device": "cpu",
        "options": {},
        "cold": False,
    }
    code = (
        "from shortstack import child\n"
        f"child.call('shortstack.devices.worker:timing', {request!r}, timeout_s=300, what='it',"
        " progress=lambda done, total: print(done, flush=True))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout as phases:
        assert [phases.readline().strip() for _ in range(2)] == ["1", "2"]
        (trial,) = psutil.Process(parent.pid).children()
        parent.kill()
        parent.wait()
    gone, _ = psutil.wait_procs([trial], timeout=30)
    assert gone == [trial]
