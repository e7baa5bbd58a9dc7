"""What machine this is and how busy it is. No host name, no user name, no path."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from shortstack.errors import ShortstackError

LIBRARIES = (
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "onnxruntime-genai-cuda",
    "llama-cpp-python",
    "gguf",
    "onnx",
    "numpy",
    "bitsandbytes",
    "torchao",
    "autoawq",
    "triton",
    "accelerate",
    "nvidia-ml-py",
)
ISA_FLAGS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "asimdhp", "i8mm", "bf16"),
    *("sve", "sve2", "sme"),
)
"""Instruction sets that the runtimes' matrix kernels choose by."""

CPU = Path("/sys/devices/system/cpu")
NODES = Path("/sys/devices/system/node")
CGROUP = Path("/sys/fs/cgroup")
MACHINE_ID = Path("/etc/machine-id")


def describe() -> dict[str, Any]:
    """Facts that stay the same during a run; what cannot be read is None."""
    import psutil

    from shortstack.devices.listing import devices

    return {
        "cpu": {
            "model": cpu_model(),
            "physical_cores": psutil.cpu_count(logical=False),
            "logical_cores": psutil.cpu_count(logical=True),
            "affinity_cores": len(_affinity()),
            "usable_cores": usable_cores(),
            "governor": _read(CPU / "cpu0/cpufreq/scaling_governor"),
            "isa": _isa(),
            "hyperthreading": _switch(CPU / "smt/active"),
            "numa_nodes": len(list(NODES.glob("node[0-9]*"))) or None,
        },
        "ram_bytes": psutil.virtual_memory().total,
        "cgroup": {"cpu_cores": _cgroup_cores(), "memory_bytes": memory_limit_bytes()},
        "power_source": _power_source(),
        "container": container(),
        "hypervisor": "hypervisor" in _cpu_flags() if sys.platform == "linux" else None,
        "os": _os_name(),
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "libraries": libraries(),
        "devices": devices(),
    }


def machine_id() -> str | None:
    """What systemd calls this installation, None elsewhere. Never for a record: hash it."""
    return _read(MACHINE_ID) or None


def conditions() -> dict[str, Any]:
    """Facts that change: recorded before and after every trial."""
    import psutil

    frequency = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    return {
        "load_average_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "cpu_mhz": round(frequency.current) if frequency and frequency.current else None,
        "available_ram_bytes": psutil.virtual_memory().available,
    }


def libraries() -> dict[str, str]:
    """Installed versions of the libraries that compute; read without importing them."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def usable_cores() -> int:
    """Physical cores that affinity and the container's quota leave us; at least 1.

    Two threads on one physical core share its arithmetic units, so siblings count once.
    """
    siblings = {_read(CPU / f"cpu{n}/topology/thread_siblings_list") or n for n in _affinity()}
    quota = _cgroup_cores()
    return max(1, min(len(siblings), int(quota) if quota else len(siblings)))


def check_threads(threads: int | None) -> None:
    """Refuse more threads than there are processors: spinning ones would wait for each other."""
    if threads is not None and threads > (limit := os.cpu_count() or 1):
        raise ShortstackError(f"{threads} threads are asked for, there are {limit} processors.")


def _affinity() -> list[int]:
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    import psutil

    return list(range(psutil.cpu_count(logical=False) or os.cpu_count() or 1))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _switch(path: Path) -> bool | None:
    text = _read(path)
    return None if text is None else text == "1"


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's fields in /proc/cpuinfo; empty elsewhere than Linux."""
    block = (_read(Path("/proc/cpuinfo")) or "").split("\n\n")[0]
    pairs = (line.partition(":") for line in block.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cpu_flags() -> set[str]:
    info = _cpuinfo()
    return set((info.get("flags") or info.get("Features") or "").split())


def _isa() -> list[str]:
    flags = _cpu_flags()
    return [flag for flag in ISA_FLAGS if flag in flags]


@functools.cache
def cpu_model() -> str | None:
    """What the processor calls itself; None where the system does not tell."""
    if sys.platform == "darwin":
        asked = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"],
            capture_output=True,
            text=True,
            check=False,
        )
        return asked.stdout.strip() or None
    return _cpuinfo().get("model name") or platform.processor() or None


def _cgroup_cores() -> float | None:
    """CPU quota in cores, cgroup v2 then v1; None where there is no limit."""
    text = _read(CGROUP / "cpu.max")
    if text is None:
        quota = _read(CGROUP / "cpu/cpu.cfs_quota_us")
        text = f"{quota} {_read(CGROUP / 'cpu/cpu.cfs_period_us')}" if quota else "max"
    parts = text.split()
    if len(parts) != 2 or not all(p.isdigit() for p in parts):
        return None
    return int(parts[0]) / int(parts[1])


def memory_limit_bytes() -> int | None:
    """Memory limit in bytes; cgroup v1 writes a number near 2**63 for none."""
    text = _read(CGROUP / "memory.max") or _read(CGROUP / "memory/memory.limit_in_bytes")
    if text is None or not text.isdigit() or int(text) > 1 << 60:
        return None
    return int(text)


def _power_source() -> str | None:
    from shortstack.devices.conditions import on_battery

    battery = on_battery()
    return None if battery is None else "battery" if battery else "mains"


def container() -> str | None:
    """Which kind of container we are in, as far as it shows; None where it does not."""
    if Path("/.dockerenv").exists():
        return "docker"
    if Path("/run/.containerenv").exists():
        return "podman"
    return "kubernetes" if "KUBERNETES_SERVICE_HOST" in os.environ else None


def _os_name() -> str:
    if sys.platform == "linux":
        try:
            return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
        except OSError:
            return "Linux"
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.version()}"
