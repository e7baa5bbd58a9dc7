"""Known times, known memory, known deaths: the record must say what happened."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from shortstack.artifact import Artifact, ExportSpec
from shortstack.devices.harness import measure, without_folders
from shortstack.devices.journal import Journal
from shortstack.devices.protocol import Protocol
from shortstack.devices.schedule import Case, schedule
from shortstack.devices.workload import Prompt, Workload
from shortstack.doctor.probes import write_tiny_gguf
from shortstack.errors import ShortstackError

from .conftest import MakeCase


def test_a_model_twice_as_fast_shows_as_faster(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt
) -> None:
    cases = [make_case("sleeper"), make_case("sleeper", "pruned")]
    original, pruned = measure(cases, workload, prompt, protocol=Protocol(opener=opener))
    for slow, fast in zip(original.decode_tokens_per_s, pruned.decode_tokens_per_s, strict=True):
        assert fast > slow


def test_a_trial_numbers_cards_as_the_list_of_devices_does(
    opener: str,
    make_case: MakeCase,
    workload: Workload,
    prompt: Prompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    (measured,) = measure(
        [make_case("instant")], workload, prompt, protocol=Protocol(opener=opener)
    )
    assert measured.runtime_info["order"] == "PCI_BUS_ID"


def test_bytes_that_a_session_found_replace_the_estimate(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt, tmp_path: Path
) -> None:
    cases = [make_case("quantizer"), make_case("instant", "pruned")]
    for _ in range(2):  # run, then read from the journal alone
        journal = Journal(tmp_path / "trials.jsonl")
        found, plain = measure(
            cases, workload, prompt, protocol=Protocol(opener=opener), journal=journal
        )
        assert found.artifact.size_bytes == 700
        assert found.artifact.weight_bytes_per_token == 600
        assert found.artifact.sha256 == cases[0].artifact.sha256
        assert plain.artifact == cases[1].artifact


def test_progress_counts_every_trial(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt
) -> None:
    seen: list[tuple[int, int]] = []
    cases = [make_case("instant"), make_case("crasher", "pruned")]
    measure(
        cases,
        workload,
        prompt,
        protocol=Protocol(opener=opener),
        progress=lambda *at: seen.append(at),
    )
    assert seen == [(done, 4) for done in range(5)]


def test_a_prompt_of_another_length_is_refused(
    opener: str, make_case: MakeCase, workload: Workload
) -> None:
    with pytest.raises(ShortstackError, match="prompt has 2 tokens"):
        measure(
            [make_case("instant")],
            workload,
            Prompt((1, 2), "short"),
            protocol=Protocol(opener=opener),
        )


def test_one_case_twice_is_refused(
    opener: str, make_case: MakeCase, workload: Workload, prompt: Prompt
) -> None:
    with pytest.raises(ShortstackError, match="measured twice"):
        measure([make_case("instant")] * 2, workload, prompt, protocol=Protocol(opener=opener))


def four_cases(make_case: MakeCase) -> list[Case]:
    return [
        make_case("instant", label, spec)
        for spec in ("gguf:Q8_0", "onnx:int8")
        for label in ("original", "pruned")
    ]


def test_original_and_pruned_are_neighbours_and_alternate(
    make_case: MakeCase, workload: Workload
) -> None:
    cases = four_cases(make_case)
    steps = schedule(cases, dataclasses.replace(workload, repeats=6, memory_repeats=2), seed=3)
    assert len(steps) == 4 * (6 + 2)
    assert [s.kind for s in steps[:8]] == ["memory"] * 8
    leaders = []
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        assert cases[first.case].group == cases[second.case].group
        assert first.round == second.round
        if first.kind == "timing" and cases[first.case].group[0].startswith("gguf"):
            leaders.append(cases[first.case].label)
    assert all(a != b for a, b in zip(leaders, leaders[1:], strict=False))


def test_both_lead_among_the_cold_rounds_and_among_the_warm_ones(
    make_case: MakeCase, workload: Workload
) -> None:
    cases = [make_case("instant"), make_case("instant", "pruned")]
    work = dataclasses.replace(workload, repeats=4)
    leaders = [step.case for step in schedule(cases, work, seed=3, cold=True)[::2]]
    assert set(leaders[::2]) == set(leaders[1::2]) == {0, 1}


def test_the_order_follows_the_seed(make_case: MakeCase, workload: Workload) -> None:
    cases = four_cases(make_case)
    workload = dataclasses.replace(workload, repeats=6)
    assert schedule(cases, workload, 1) == schedule(cases, workload, 1)
    assert len({tuple(schedule(cases, workload, seed)) for seed in range(5)}) > 1


def test_a_real_runtime_goes_through_the_same_harness(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    artifact = Artifact(
        path=path,
        spec=ExportSpec.parse("gguf:Q8_0"),
        n_layers=2,
        n_params=1,
        size_bytes=path.stat().st_size,
        weight_bytes_per_token=1,
        sha256="a" * 64,
        source_sha256="b" * 64,
    )
    work = Workload(prompt_tokens=32, decode_tokens=4, repeats=2, memory_repeats=1, threads=1)
    prompt = Prompt(tuple(range(32)), "numbers")
    (measured,) = measure([Case("original", artifact, "llama.cpp")], work, prompt)
    assert measured.failure is None
    assert measured.runtime_info["threads"] == 1
    assert len({trial.output_sha256 for trial in measured.trials}) == 1
    assert measured.memory[0].peak_total_bytes > path.stat().st_size


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ("cannot open /home/me/x.bin", "cannot open x.bin"),
        ("error:/home/me/models/x.bin: no file", "error:x.bin: no file"),
        ("error: C:\\Users\\me\\x.bin", "error: x.bin"),
        ("in file:///home/me/x.bin", "in file:x.bin"),
        ("see https://example.org/docs/page", "see https://example.org/docs/page"),
        ("half/half and 3 tokens/s", "half/half and 3 tokens/s"),
    ],
)
def test_no_folder_stands_in_a_record(told: str, kept: str) -> None:
    assert without_folders(told, Path("/data/model.gguf")) == kept
