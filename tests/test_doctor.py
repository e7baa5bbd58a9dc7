"""The doctor: real runtimes really run, real crashes really crash, and each has its remedy."""

from __future__ import annotations

import importlib.metadata
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from shortstack.doctor import (
    RUNTIMES,
    Finding,
    Runtime,
    devices,
    examine,
    extras,
    healthy,
    installed_packages,
    machine,
    onnxruntime_twins,
    python,
    try_runtime,
)
from shortstack.errors import ShortstackError


def works(request: Mapping[str, Any]) -> dict[str, str]:
    return {"fact": "works"}


def dies(request: Mapping[str, Any]) -> dict[str, str]:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def hangs(request: Mapping[str, Any]) -> dict[str, str]:
    signal.pause()
    return {}


def throws(request: Mapping[str, Any]) -> dict[str, str]:
    raise ImportError("libfoo.so.1: cannot open shared object file")


def refuses(request: Mapping[str, Any]) -> dict[str, str]:
    raise ShortstackError("this computes a wrong answer")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a child import the functions above."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def a_runtime(function: str, fallback: str | None = None) -> Runtime:
    name = fallback and f"test_doctor:{fallback}"
    return Runtime("toy", ("toy",), "gguf", f"test_doctor:{function}", "Rebuild it.", name)


HAVE = {"toy": "1.0"}


def test_a_runtime_that_works_is_ok() -> None:
    assert try_runtime(a_runtime("works"), HAVE) == Finding("toy", "ok", "toy 1.0: works")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("dies", "died of signal SIGSEGV"),
        ("throws", "libfoo.so.1: cannot open shared object file"),
        ("refuses", "says: this computes a wrong answer"),
    ],
)
def test_a_runtime_that_fails_is_a_problem_with_its_remedy(function: str, words: str) -> None:
    finding = try_runtime(a_runtime(function), HAVE)
    assert finding.status == "problem"
    assert words in finding.fact
    assert "\n" not in finding.fact
    assert finding.next_step == "Rebuild it."
    assert not healthy([finding])


def test_a_runtime_that_hangs_is_given_up() -> None:
    finding = try_runtime(a_runtime("hangs"), HAVE, timeout_s=2)
    assert finding.status == "problem"
    assert "gave no answer in 2 s" in finding.fact


def test_a_crash_with_a_way_round_is_a_warning() -> None:
    finding = try_runtime(a_runtime("dies", fallback="works"), HAVE)
    assert finding.status == "warning"
    assert "SIGSEGV" in finding.fact
    assert "way round" in finding.fact
    assert finding.next_step == "Rebuild it."
    assert healthy([finding])


def test_a_crash_whose_way_round_crashes_too_is_a_problem() -> None:
    assert try_runtime(a_runtime("dies", fallback="dies"), HAVE).status == "problem"


def test_a_runtime_that_is_not_installed_names_its_pip_command() -> None:
    finding = try_runtime(a_runtime("works"), {})
    assert finding.status == "warning"
    assert "pip install 'shortstack[gguf]'" in finding.next_step


def test_the_remedy_for_llama_cpp_leaves_amx_out_and_pins_our_version() -> None:
    remedy = next(r.remedy for r in RUNTIMES if r.name == "llama.cpp")
    assert 'CFLAGS="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"' in remedy
    assert 'CXXFLAGS="-mno-amx-tile' in remedy
    pinned = [r for r in importlib.metadata.requires("shortstack") or () if "llama-cpp" in r]
    assert pinned[0].split(";")[0] in remedy


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda r: r.name)
def test_every_installed_runtime_works_here(runtime: Runtime) -> None:
    have = installed_packages()
    if not any(package in have for package in runtime.packages):
        pytest.skip(f"{runtime.packages[0]} is not installed")
    finding = try_runtime(runtime)
    assert finding.status == "ok", finding


def test_our_own_session_runs_the_tiny_model() -> None:
    pytest.importorskip("llama_cpp")
    fallback = next(r.fallback for r in RUNTIMES if r.name == "llama.cpp")
    assert fallback is not None
    as_main = Runtime("llama.cpp", ("llama-cpp-python",), "gguf", fallback, "")
    assert try_runtime(as_main).status == "ok"


def test_both_onnxruntimes_are_a_problem_that_says_what_to_uninstall() -> None:
    have = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    (finding,) = onnxruntime_twins(have)
    assert finding.status == "problem"
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in finding.next_step
    assert onnxruntime_twins({"onnxruntime": "1.31.1"}) == []


REQUIRES = (
    "numpy>=1.26",
    'torch>=2.6; extra == "prune"',
    'llama-cpp-python==0.3.36; extra == "gguf"',
    'onnxruntime-genai==0.18.*; extra == "onnx"',
    'onnxruntime-genai-cuda==0.18.*; extra == "cuda"',
    'optimum-onnx==0.1.0; extra == "optimum"',
    'shortstack[prune]; extra == "demo"',
    'spdx==2.5.1; extra == "demo"',
)


def found(have: dict[str, str]) -> dict[str, Finding]:
    return {finding.name: finding for finding in extras(REQUIRES, have)}


def test_extras_say_what_is_there_what_is_missing_and_what_is_too_old() -> None:
    findings = found(
        {"numpy": "2.4.6", "torch": "2.13.0+cpu", "onnxruntime-genai": "0.17.2", "spdx": "2.5.1"}
    )
    assert findings["core packages"].status == "ok"
    assert findings["extra prune"] == Finding("extra prune", "ok", "torch 2.13.0+cpu")
    assert findings["extra gguf"].status == "warning"
    assert findings["extra gguf"].next_step == "Run: pip install 'shortstack[gguf]'"
    assert findings["extra onnx"].status == "problem"
    assert "0.17.2 (needs ==0.18.*)" in findings["extra onnx"].fact
    assert findings["extra cuda"].status == "ok"
    assert findings["extra demo"].fact == "spdx 2.5.1"


def test_a_missing_core_package_is_a_problem() -> None:
    assert found({})["core packages"].status == "problem"


def test_the_optimum_extra_is_not_advised_beside_onnx() -> None:
    finding = found({})["extra optimum"]
    assert finding.status == "ok"
    assert "an environment of its own" in finding.fact


def test_the_cuda_extra_stands_in_for_onnx() -> None:
    assert "extra onnx" not in found({"onnxruntime-genai-cuda": "0.18.0"})


@pytest.mark.parametrize(
    ("version", "ok"), [("0.18.0", True), ("0.18.3", True), ("0.180.0", False), ("0.19.0", False)]
)
def test_star_limits_compare_numbers_not_letters(version: str, ok: bool) -> None:
    have = {"onnxruntime-genai": version}
    assert (found(have)["extra onnx"].status == "ok") is ok


def test_the_real_metadata_is_understood() -> None:
    names = {finding.name for finding in extras()}
    assert {"core packages", "extra prune", "extra gguf", "extra onnx", "extra cuda"} <= names


def test_this_machine_is_described() -> None:
    names = [finding.name for finding in [*python(), *machine(), *devices()]]
    assert names == ["Python", "cores", "RAM", "disk", "device cpu"]


def test_examine_runs_the_given_probes_and_reports_progress() -> None:
    seen: list[tuple[int, int]] = []
    fine, bad = Finding("a", "ok", "x"), Finding("b", "problem", "y", "z")
    probes = [lambda: [fine], lambda: [bad]]
    assert examine(probes, progress=lambda *at: seen.append(at)) == [fine, bad]
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert not healthy([fine, bad])
    assert healthy([fine, Finding("c", "warning", "y")])
    assert bad.to_dict() == {"name": "b", "status": "problem", "fact": "y", "next_step": "z"}
