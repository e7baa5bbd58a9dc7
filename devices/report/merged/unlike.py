"""Whether two measurements may stand side by side, and if not, why."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shortstack.devices.record_fields import MeasurementRecord, WorkloadRecord
from shortstack.devices.report.merged.cases import Case

WORK = (
    *("prompt_tokens", "decode_tokens", "depth_tokens", "batch"),
    "warmup_decode_tokens",
)
"""What a trial does. How often it is repeated widens an interval and moves no median."""
CIRCUMSTANCES = ("seed", "timeout_s")
"""Of the protocol, but without a hand in the figures: another seed is another order of trials."""


def why_unlike(case: Case, other: Case, *, artifact: bool = True) -> list[str]:
    """Reasons not to compare `case` with `other`, each naming both values; empty: may compare.

    Threads are the machine's on two machines and a setting on one. `artifact=False` where the
    artifact is what is compared.
    """
    a, b = case.measurement, other.measurement
    found = []
    if artifact and a.artifact.sha256 != b.artifact.sha256:
        found.append(_said("artifact", a.artifact.sha256[:8], b.artifact.sha256[:8]))
    found += [
        _said("workload", f"{name} {mine}", f"{theirs}")
        for name in WORK
        if (mine := getattr(a.workload, name)) != (theirs := getattr(b.workload, name))
    ]
    mine, theirs = warmed_up(a.workload), warmed_up(b.workload)
    if mine != theirs and (a.device == "cpu") == (b.device == "cpu"):
        found.append(_said("workload", f"warm-up prompt {mine} tokens", f"{theirs}"))
    same_place = case.place == other.place
    if same_place and a.workload.threads != b.workload.threads:
        found.append(_said("workload", f"threads {a.workload.threads}", f"{b.workload.threads}"))
    if a.prompt_sha256 != b.prompt_sha256:
        found.append(_said("prompt", a.prompt_sha256[:8], b.prompt_sha256[:8]))
    found += _options(a, b)
    found += _protocol(a.protocol, b.protocol)
    if a.runtime != b.runtime:
        found.append(_said("runtime", a.runtime, b.runtime))
    elif (mine := runtime_major(a)) != (theirs := runtime_major(b)):
        found.append(_said("runtime major", mine, theirs))
    return found


def warmed_up(workload: WorkloadRecord) -> int:
    """Tokens of the warm-up's prompt: at most those there are. On CPUs fewer of a long prompt than
    on cards, where kernels are chosen by shape."""
    return min(workload.warmup_prompt_tokens, workload.depth_tokens + workload.prompt_tokens)


def not_comparable(reasons: list[str]) -> str:
    return f"not comparable: {'; '.join(reasons)}"


def runtime_major(measurement: MeasurementRecord) -> str:
    """`1` of 1.31.1; of versions below 1 also the minor, which may break anything: `0.3`."""
    version = str(measurement.runtime_info.get("version") or "")
    numbers = re.findall(r"\d+", version)
    if not numbers:
        return version or "unknown"
    return ".".join(numbers[:2]) if numbers[0] == "0" else numbers[0]


def _protocol(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    names = sorted({*a, *b} - set(CIRCUMSTANCES))
    differ = [name for name in names if a.get(name) != b.get(name)]
    return [f"other protocol ({', '.join(differ)})"] if differ else []


def _options(a: MeasurementRecord, b: MeasurementRecord) -> list[str]:
    """What was asked of the runtime and, of one runtime, the type that its cache had in the end:
    a default may change."""
    found = [
        _said("option", f"{name} {a.options.get(name, 'not set')}", b.options.get(name, "not set"))
        for name in sorted({*a.options, *b.options})
        if a.options.get(name) != b.options.get(name)
    ]
    mine, theirs = (m.runtime_info.get("kv_cache") for m in (a, b))
    if a.runtime == b.runtime and mine and theirs and mine != theirs:
        found.append(_said("KV cache", str(mine), str(theirs)))
    return found


def _said(what: str, mine: str, theirs: str) -> str:
    return f"other {what} ({mine} against {theirs})"
