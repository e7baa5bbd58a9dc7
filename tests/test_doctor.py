"""The doctor: real runtimes really run, real crashes really crash, and each has its remedy."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from shortstack import child, runtimes
from shortstack.devices import nvidia
from shortstack.doctor import (
    devices,
    energy_counters,
    examine,
    extras,
    installed_packages,
    machine,
    onnxruntime_twins,
    python,
)
from shortstack.doctor import probes as doctor_probes
from shortstack.doctor.findings import Finding, healthy
from shortstack.doctor.onnx import decoder_answer
from shortstack.doctor.pairs import RUNTIMES, Runtime, pairs, try_runtime
from shortstack.errors import MissingExtraError, ShortstackError


def works(request: Mapping[str, Any]) -> dict[str, str]:
    return {"fact": "works"}


def names_its_device(request: Mapping[str, Any]) -> dict[str, str]:
    return {"fact": f"works on {request['device']}"}


def lacks(request: Mapping[str, Any]) -> dict[str, str]:
    return {"lacks": "this build has no CUDA"}


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
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)


def a_runtime(function: str, fallback: str | None = None) -> Runtime:
    name = fallback and f"test_doctor:{fallback}"
    beyond = {"cuda": "Rebuild it for CUDA."}
    return Runtime("toy", ("toy",), "gguf", f"test_doctor:{function}", "Rebuild it.", name, beyond)


HAVE = {"toy": "1.0"}


def test_a_runtime_that_works_is_ok() -> None:
    assert try_runtime(a_runtime("works"), HAVE) == Finding("toy on cpu", "ok", "toy 1.0: works")


def test_the_probe_is_told_its_device() -> None:
    finding = try_runtime(a_runtime("names_its_device"), HAVE, "cuda:1")
    assert finding == Finding("toy on cuda:1", "ok", "toy 1.0: works on cuda:1")


def test_a_build_without_the_device_is_a_warning_that_says_how_to_get_one() -> None:
    finding = try_runtime(a_runtime("lacks"), HAVE, "cuda:0")
    assert finding == Finding(
        "toy on cuda:0", "warning", "toy 1.0: this build has no CUDA", "Rebuild it for CUDA."
    )
    assert healthy([finding])


def test_a_crash_on_a_card_is_a_problem_with_the_cards_remedy() -> None:
    finding = try_runtime(a_runtime("dies"), HAVE, "cuda:0")
    assert (finding.status, finding.next_step) == ("problem", "Rebuild it for CUDA.")


NAMES = ("llama.cpp", "onnxruntime", "onnxruntime-genai", "pytorch", "pytorch-packed")


def survey(*ids: str, **missing: str) -> dict[str, Any]:
    found = [{"id": i, "kind": i.partition(":")[0], "name": "x", "vram_bytes": 1} for i in ids]
    return {"devices": found, "missing": missing}


def test_every_runtime_is_tried_on_every_device_it_can_run_on() -> None:
    tried = [p()[0].name for p in pairs(survey("cpu", "cuda:0", "metal:0", "vulkan:0"), {})]
    assert tried == [
        *(f"{name} on cpu" for name in NAMES),
        *(f"{name} on cuda:0" for name in NAMES),
        *("llama.cpp on metal:0", "pytorch on metal:0", "llama.cpp on vulkan:0"),
    ]


def test_without_a_card_each_runtime_says_why_and_what_to_install() -> None:
    found = [p()[0] for p in pairs(survey("cpu", cuda="no driver"), {})][len(RUNTIMES) :]
    assert [f.name for f in found] == [f"{r.name} on cuda" for r in RUNTIMES]
    assert {f.status for f in found} == {"ok"}
    assert {f.fact for f in found} == {"not tried: no driver"}
    assert all("pip install" in f.next_step for f in found)
    assert "GGML_CUDA=on" in found[0].next_step
    assert "shortstack[cuda]" in found[1].next_step


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda r: r.name)
def test_a_runtime_for_the_cpu_alone_says_that_it_lacks_cuda(runtime: Runtime) -> None:
    pytest.importorskip(
        {"llama.cpp": "llama_cpp", "pytorch": "torch", "pytorch-packed": "zstandard"}.get(
            runtime.name, runtime.name.replace("-", "_")
        )
    )
    finding = try_runtime(runtime, installed_packages(), "cuda:0")
    if finding.status == "ok":
        pytest.skip(f"{runtime.name} runs on a card here: {finding.fact}")
    assert finding.status == "warning", finding
    assert "CUDA" in finding.next_step or "cu" in finding.next_step


def test_llama_cpp_computes_on_the_device_it_is_given(tmp_path: Path) -> None:
    """The CPU by its place in llama.cpp's own list: the way a card is chosen."""
    pytest.importorskip("llama_cpp")
    answer = child.call("test_doctor:by_handle", {}, timeout_s=60, what="llama.cpp")
    assert answer["difference"] < doctor_probes.CLOSE * answer["spread"]


def by_handle(request: Mapping[str, Any]) -> dict[str, float]:
    from shortstack.llama_devices import handles

    with tempfile.TemporaryDirectory() as folder:
        path = doctor_probes.write_tiny_gguf(Path(folder) / "tiny.gguf")
        plain = {"n_gpu_layers": 0, "use_extra_bufts": False}
        free = doctor_probes._llama_logits(path, plain)
        given = doctor_probes._llama_logits(path, plain, handles()["CPU"])
    return {"difference": float(abs(free - given).max()), "spread": float(free.std())}


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime_genai"])
def test_a_wrong_answer_of_the_tiny_decoder_is_seen(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip(name)
    monkeypatch.setattr(doctor_probes, "decoder_answer", lambda tokens: decoder_answer(tokens) + 1)
    with pytest.raises(ShortstackError, match="wrong answer"):
        getattr(doctor_probes, name)({"device": "cpu"})


def test_every_runtime_of_the_table_is_tried() -> None:
    assert {runtime.name for runtime in RUNTIMES} == set(runtimes.RUNTIMES)


def test_a_wrong_answer_of_the_packed_model_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("zstandard")
    from shortstack.doctor import packed

    told = packed._logits
    monkeypatch.setattr(
        packed,
        "_logits",
        lambda path, runtime, device, options: (
            told(path, runtime, device, options) + (options.get("form") == "int8")
        ),
    )
    with pytest.raises(ShortstackError, match="form=int8 on cpu computes a wrong answer"):
        packed.pytorch_packed({"device": "cpu"})


def test_packed_files_without_their_package_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from shortstack.doctor import packed
    from shortstack.packed import runnable

    def lacking() -> None:
        raise MissingExtraError("zstandard", "pack", "running a packed model")

    monkeypatch.setattr(runnable, "check_runnable", lacking)
    assert "shortstack[pack]" in packed.pytorch_packed({"device": "cpu"})["lacks"]


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
    finding = try_runtime(runtime, have)
    assert finding.status == "ok", finding


def test_our_own_session_runs_the_tiny_model() -> None:
    pytest.importorskip("llama_cpp")
    fallback = next(r.fallback for r in RUNTIMES if r.name == "llama.cpp")
    assert fallback is not None
    as_main = Runtime("llama.cpp", ("llama-cpp-python",), "gguf", fallback, "")
    assert try_runtime(as_main, installed_packages()).status == "ok"


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
    names = [finding.name for finding in [*python(), *machine(), *devices(survey("cpu"))]]
    assert names == ["Python", "cores", "RAM", "disk", "device cpu"]


def test_a_card_is_described_and_what_is_not_here_has_its_reason() -> None:
    found = survey("cpu", "cuda:0", **{"llama.cpp": "built for the CPU alone"})
    found["devices"][1] |= {
        "name": "NVIDIA Fake",
        "vram_bytes": 80_000_000_000,
        "driver": "580.1",
        "cuda": "13.0",
        "power_limit_w": 500.0,
        "other_processes": 2,
    }
    _, card, missing = devices(found)
    assert card.fact == (
        "NVIDIA Fake, 80.0 GB, driver 580.1 for CUDA 13.0, 500 W, used by 2 other processes"
    )
    assert missing == Finding("devices by llama.cpp", "ok", "built for the CPU alone")


@pytest.mark.parametrize(("driver", "status"), [(True, "warning"), (False, "ok")])
def test_cards_that_cannot_be_asked_are_a_warning_where_there_is_a_driver(
    monkeypatch: pytest.MonkeyPatch, driver: bool, status: str
) -> None:
    monkeypatch.setattr(nvidia, "driver_seen", lambda: driver)
    finding = devices(survey("cpu", cuda="version mismatch"))[1]
    assert (finding.status, finding.fact) == (status, "version mismatch")


def test_energy_counters_are_named_or_have_a_reason() -> None:
    first = energy_counters()[0]
    assert (first.name, first.status) == ("energy of cpu", "ok")
    assert "RAPL" in first.fact


def test_examine_runs_the_given_probes_and_reports_progress() -> None:
    seen: list[tuple[int, int]] = []
    fine, bad = Finding("a", "ok", "x"), Finding("b", "problem", "y", "z")
    probes = [lambda: [fine], lambda: [bad]]
    assert examine(probes, progress=lambda *at: seen.append(at)) == [fine, bad]
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert not healthy([fine, bad])
    assert healthy([fine, Finding("c", "warning", "y")])
    assert bad.to_dict() == {"name": "b", "status": "problem", "fact": "y", "next_step": "z"}
