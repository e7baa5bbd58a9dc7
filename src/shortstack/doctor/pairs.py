"""Every runtime on every device: a tiny model is opened on each pair, in a child that may die."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shortstack import child
from shortstack.devices.nvidia import ORDER
from shortstack.doctor.findings import Finding
from shortstack.errors import ShortstackError

Probe = Callable[[], Sequence[Finding]]
TIMEOUT_S = 120.0
LLAMA = "llama-cpp-python==0.3.36"
TORCH_FOR_CUDA = (
    "Run: pip install --force-reinstall torch --index-url "
    "https://download.pytorch.org/whl/cu130 (drivers before 580: cu126)"
)
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"


@dataclass(frozen=True)
class Runtime:
    """How a runtime is tried: `function` is `module:name`, called in a process of its own.

    Its request is {"device": id}. It answers {"fact": words}, or {"lacks": words} where this build
    of the runtime was not made for that device.
    """

    name: str
    packages: tuple[str, ...]
    extra: str
    function: str
    remedy: str
    fallback: str | None = None
    """Tried where `function` fails: the way round that our own session takes."""

    beyond: Mapping[str, str] = field(default_factory=dict)
    """Kind of device besides the CPU that it can run on -> the command that installs it so."""


def rebuild_llama(backend: str = "") -> str:
    """The command that compiles llama.cpp without AMX (gcc on x86; others need no flags)."""
    flags = f'CFLAGS="{NO_AMX}" CXXFLAGS="{NO_AMX}" '
    cmake = f'CMAKE_ARGS="-DGGML_{backend}=on" ' if backend else ""
    install = "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python"
    return f"On x86 with gcc run: {flags}{cmake}{install} {LLAMA}"


def _swap(*packages: str) -> str:
    """onnxruntime for CUDA is another package of the same module: the one for the CPU must go."""
    return f"Run: pip uninstall -y {' '.join(packages)}; pip install 'shortstack[cuda]'"


RUNTIMES = (
    Runtime(
        "llama.cpp",
        ("llama-cpp-python",),
        "gguf",
        "shortstack.doctor.probes:llama_cpp",
        rebuild_llama(),
        "shortstack.doctor.probes:llama_cpp_session",
        {
            "cuda": rebuild_llama("CUDA"),
            "rocm": rebuild_llama("HIP"),
            "vulkan": rebuild_llama("VULKAN"),
            "metal": f'Run: CMAKE_ARGS="-DGGML_METAL=on" pip install --force-reinstall {LLAMA}',
        },
    ),
    Runtime(
        "onnxruntime",
        ("onnxruntime", "onnxruntime-gpu"),
        "onnx",
        "shortstack.doctor.probes:onnxruntime",
        "Run: pip install --force-reinstall 'shortstack[onnx]'",
        beyond={"cuda": _swap("onnxruntime", "onnxruntime-genai")},
    ),
    Runtime(
        "onnxruntime-genai",
        ("onnxruntime-genai", "onnxruntime-genai-cuda"),
        "onnx",
        "shortstack.doctor.probes:onnxruntime_genai",
        "Run: pip install --force-reinstall 'shortstack[onnx]'",
        beyond={"cuda": _swap("onnxruntime", "onnxruntime-genai")},
    ),
    Runtime(
        "pytorch",
        ("torch",),
        "prune",
        "shortstack.doctor.probes:pytorch",
        "Run: pip install --force-reinstall 'shortstack[prune]'",
        beyond={
            "cuda": TORCH_FOR_CUDA,
            "metal": "Run: pip install --force-reinstall 'shortstack[prune]'",
        },
    ),
    Runtime(
        "pytorch-packed",
        ("torch", "zstandard"),
        "prune,pack",
        "shortstack.doctor.packed:pytorch_packed",
        "Run: pip install --force-reinstall 'shortstack[prune,pack]'",
        beyond={"cuda": TORCH_FOR_CUDA},
    ),
)


def try_runtime(
    runtime: Runtime,
    installed: Mapping[str, str],
    device: str = "cpu",
    timeout_s: float = TIMEOUT_S,
) -> Finding:
    """Compute something known with the runtime on a device. What only a card lacks is a warning."""
    name = f"{runtime.name} on {device}"
    kind = device.partition(":")[0]
    remedy = runtime.beyond.get(kind, runtime.remedy)
    found = [
        f"{package} {installed[package]}" for package in runtime.packages if package in installed
    ]
    if not found:
        step = f"Run: pip install 'shortstack[{runtime.extra}]'" if kind == "cpu" else remedy
        return Finding(name, "warning", "not installed", step)
    version = ", ".join(found)
    answer, failure = _attempt(name, runtime.function, device, timeout_s)
    if "lacks" in answer:
        return Finding(name, "warning", f"{version}: {answer['lacks']}", remedy)
    if failure is None:
        return Finding(name, "ok", f"{version}: {answer['fact']}")
    if runtime.fallback and _attempt(name, runtime.fallback, device, timeout_s)[1] is None:
        fact = (
            f"{version}: with its defaults it {failure}; a slower way round works and is in force"
        )
        return Finding(name, "warning", fact, remedy)
    return Finding(name, "problem", f"{version}: {failure}", remedy)


def pairs(survey: Mapping[str, Any], installed: Mapping[str, str]) -> Iterator[Probe]:
    """A probe for each pair that can be; where there is no NVIDIA card, one that says why not.

    `survey` as shortstack.devices.listing gives it.
    """

    def tried(runtime: Runtime, device: str) -> Probe:
        return lambda: [try_runtime(runtime, installed, device)]

    def missed(runtime: Runtime) -> Probe:
        reason = survey["missing"].get("cuda", "no NVIDIA card is here")
        return lambda: [not_tried(runtime, "cuda", reason)]

    for device in survey["devices"]:
        for runtime in RUNTIMES:
            if device["kind"] == "cpu" or device["kind"] in runtime.beyond:
                yield tried(runtime, device["id"])
    if all(device["kind"] != "cuda" for device in survey["devices"]):
        yield from map(missed, RUNTIMES)


def not_tried(runtime: Runtime, kind: str, reason: str) -> Finding:
    """A pair without its device: nothing is wrong."""
    step = f"Where one is: {runtime.beyond[kind].removeprefix('Run: ')}"
    return Finding(f"{runtime.name} on {kind}", "ok", f"not tried: {reason}", step)


def _attempt(
    name: str, function: str, device: str, timeout_s: float
) -> tuple[dict[str, Any], str | None]:
    """(what the probe answers, None) or ({}, how it failed)."""
    try:
        answer = child.call(function, {"device": device}, timeout_s=timeout_s, what=name, env=ORDER)
        return answer, None
    except child.ChildCrashError as error:
        words = error.reason if error.kind != "exit" else str(error).removeprefix(f"{name} ")
        return {}, words.removesuffix(" See what works here: shortstack doctor")
    except ShortstackError as error:
        return {}, f"says: {error}"
