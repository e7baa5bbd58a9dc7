"""Look at this machine and this installation; say what works, what does not, and what to do."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shortstack.doctor.findings import Finding, Status
from shortstack.doctor.pairs import Probe, pairs
from shortstack.progress import OnProgress, silent

LEAST_PYTHON = (3, 11)
LOW_RAM_BYTES = 2_000_000_000
LOW_DISK_BYTES = 5_000_000_000
OPTIONAL = {
    "cuda": "for NVIDIA GPUs, in place of onnx",
    "optimum": "for ONNX by optimum-onnx, in an environment of its own without onnx",
    "demo": "for make demo",
    "dev": "for tests",
}


def examine(
    probes: Sequence[Probe] | None = None, *, progress: OnProgress = silent
) -> list[Finding]:
    """Run every probe; the real ones by default. Takes seconds: each runtime starts a process."""
    chosen = all_probes() if probes is None else list(probes)
    findings: list[Finding] = []
    for done, probe in enumerate(chosen):
        progress(done, len(chosen))
        findings += probe()
    progress(len(chosen), len(chosen))
    return findings


def all_probes() -> list[Probe]:
    from shortstack.devices.listing import survey

    tries = pairs(survey(), installed_packages())
    return [python, extras, onnxruntime_twins, machine, devices, *tries, energy_counters]


def python() -> list[Finding]:
    found = sys.version_info[:3]
    text = ".".join(map(str, found))
    if found < LEAST_PYTHON:
        step = "Install Python 3.11 or newer and make a new environment with it."
        return [Finding("Python", "problem", f"{text} is too old", step)]
    return [Finding("Python", "ok", text)]


def extras(
    requires: Sequence[str] | None = None, installed: Mapping[str, str] | None = None
) -> list[Finding]:
    """Each extra's packages, by their metadata: nothing is imported."""
    have = installed_packages() if installed is None else installed
    if requires is None:
        try:
            requires = importlib.metadata.requires("shortstack") or ()
        except importlib.metadata.PackageNotFoundError:
            step = "Run: pip install shortstack (or: pip install -e . in its folder)"
            return [Finding("shortstack", "problem", "is not installed as a package", step)]
    wanted: dict[str, list[tuple[str, str]]] = {}
    for line in requires:
        extra, name, limits = _parse(line)
        if name != "shortstack":  # an extra made of other extras
            wanted.setdefault(extra, []).append((name, limits))
    complete = {e for e, needs in wanted.items() if all(_fits(have.get(n), v) for n, v in needs)}
    replaced = {"onnx"} if "cuda" in complete else set()
    return [
        _extra_finding(extra, needs, have)
        for extra, needs in wanted.items()
        if extra not in replaced - complete
    ]


def onnxruntime_twins(installed: Mapping[str, str] | None = None) -> list[Finding]:
    """onnxruntime and onnxruntime-gpu share one module; with both, which one runs is chance."""
    have = installed_packages() if installed is None else installed
    findings = []
    for cpu, gpu in (
        ("onnxruntime", "onnxruntime-gpu"),
        ("onnxruntime-genai", "onnxruntime-genai-cuda"),
    ):
        if cpu in have and gpu in have:
            fact = f"{cpu} {have[cpu]} and {gpu} {have[gpu]} are both installed, as one module"
            step = f"Run: pip uninstall -y {cpu} {gpu}; then install one: pip install {cpu}"
            findings.append(Finding(f"{cpu} or {gpu}", "problem", fact, step))
    return findings


def machine() -> list[Finding]:
    """Cores, memory and disk, with what is free now."""
    import psutil

    from shortstack.devices.host import describe

    facts = describe()
    cpu, memory, disk = facts["cpu"], psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    limit = facts["cgroup"]["memory_bytes"]
    ram_words = f"{_gb(memory.available)} free of {_gb(memory.total)}"
    if limit:
        ram_words += f"; this container may use {_gb(limit)}"
    cores = (
        f"{cpu['usable_cores']} to use, of {cpu['physical_cores'] or 'unknown'} physical and "
        f"{cpu['logical_cores']} logical"
    )
    return [
        Finding("cores", "ok", cores),
        _room("RAM", memory.available, LOW_RAM_BYTES, ram_words, "Close other programs."),
        _room(
            "disk",
            disk.free,
            LOW_DISK_BYTES,
            f"{_gb(disk.free)} free of {_gb(disk.total)} where you are",
            "Free some space, or give -o on another disk.",
        ),
    ]


def devices(survey: Mapping[str, Any] | None = None) -> list[Finding]:
    """What models can run on, and why there is no more of it."""
    from shortstack.devices import listing
    from shortstack.devices.host import describe
    from shortstack.devices.nvidia import driver_seen

    found = listing.survey() if survey is None else survey
    isa = ", ".join(describe()["cpu"]["isa"])
    here = [
        Finding(f"device {one['id']}", "ok", _device_words(one, isa)) for one in found["devices"]
    ]
    return here + [
        Finding(f"devices by {_ASKED[kind]}", _unless(kind == "cuda" and driver_seen()), reason)
        for kind, reason in found["missing"].items()
    ]


def energy_counters() -> list[Finding]:
    """Which energy counters can be read; none is no fault, records then say why."""
    from shortstack.devices import energy, listing

    findings = []
    for one in listing.devices():
        counters, reasons = energy.counters(one["id"])
        words = [f"{counter.scope} by {counter.method}" for counter in counters]
        findings.append(Finding(f"energy of {one['id']}", "ok", "; ".join(words + reasons)))
    return findings


_ASKED = {"cuda": "NVML", "llama.cpp": "llama.cpp"}


def _unless(limited: bool) -> Status:
    return "warning" if limited else "ok"


def _device_words(one: Mapping[str, Any], isa: str) -> str:
    words = [one["name"] or "unknown"]
    if one["kind"] == "cpu":
        return f"{words[0]} ({isa})" if isa else words[0]
    if one["vram_bytes"]:
        words.append(_gb(one["vram_bytes"]))
    if one.get("driver"):
        words.append(f"driver {one['driver']} for CUDA {one['cuda']}")
    if one.get("power_limit_w"):
        words.append(f"{one['power_limit_w']:g} W")
    if one.get("other_processes"):
        words.append(f"used by {one['other_processes']} other processes")
    return ", ".join(words)


def installed_packages() -> dict[str, str]:
    """Normalized name -> version of everything installed."""
    return {
        _normal(d.metadata["Name"]): d.version
        for d in importlib.metadata.distributions()
        if d.metadata["Name"]
    }


def _extra_finding(
    extra: str, needs: Sequence[tuple[str, str]], have: Mapping[str, str]
) -> Finding:
    name = f"extra {extra}" if extra else "core packages"
    target = f"'shortstack[{extra}]'" if extra else "shortstack"
    missing = [package for package, _ in needs if package not in have]
    wrong = [
        f"{package} {have[package]} (needs {limits})"
        for package, limits in needs
        if package in have and not _fits(have[package], limits)
    ]
    if missing and extra in OPTIONAL:
        fact = f"not installed: {', '.join(missing)}; {OPTIONAL[extra]}"
        return Finding(name, "ok", fact, f"If wanted: pip install {target}")
    if missing:
        status: Status = "warning" if extra else "problem"
        fact = f"not installed: {', '.join(missing)}"
        return Finding(name, status, fact, f"Run: pip install {target}")
    if wrong:
        step = f"Run: pip install --upgrade {target}"
        return Finding(name, "problem", f"wrong version: {', '.join(wrong)}", step)
    return Finding(name, "ok", ", ".join(f"{package} {have[package]}" for package, _ in needs))


def _parse(requirement: str) -> tuple[str, str, str]:
    """(extra or "", normalized name, version limits) of one metadata line."""
    body, _, marker = requirement.partition(";")
    named = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
    match = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*\(?([^)]*)\)?", body)
    name, limits = (match[1], match[2].strip()) if match else (body.strip(), "")
    return (named[1] if named else ""), _normal(name), limits


def _fits(version: str | None, limits: str) -> bool:
    """Whether a version keeps `>=` and `==` limits; other kinds we do not use and let pass."""
    if version is None:
        return False
    for limit in filter(None, (part.strip() for part in limits.split(","))):
        match = re.fullmatch(r"(>=|==)\s*([\d.]+?)(\.\*)?", limit)
        if match is None:
            continue
        have, want = _numbers(version), _numbers(match[2])
        if match[1] == ">=" and have < want:
            return False
        if match[1] == "==" and (have[: len(want)] if match[3] else have) != want:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """The release part as numbers, zeros at the end dropped: 1.20.0+cpu is (1, 20)."""
    parts = [int(n) for n in re.findall(r"\d+", re.split(r"[a-zA-Z+-]", version)[0])]
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _room(name: str, free: int, low: int, fact: str, step: str) -> Finding:
    if free < low:
        return Finding(name, "warning", f"{fact}; {_gb(low)} are little enough", step)
    return Finding(name, "ok", fact)


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
