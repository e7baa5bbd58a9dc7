"""bench.json of schema 2 as plain data: a laptop, a server with a card, any number of models."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]

LAPTOP: Json = {
    "cpu": {
        "model": "Example(R) Core(TM) 7 CPU",
        "physical_cores": 8,
        "logical_cores": 16,
        "affinity_cores": 16,
        "usable_cores": 8,
        "governor": "performance",
        "isa": ["avx2", "fma"],
    },
    "ram_bytes": 32_000_000_000,
    "cgroup": {"cpu_cores": None, "memory_bytes": None},
    "container": None,
    "hypervisor": False,
    "os": "Debian GNU/Linux 12",
    "kernel": "Linux 6.1",
    "machine": "x86_64",
    "python": "3.11.9",
    "libraries": {"numpy": "2.0.0"},
    "devices": [{"id": "cpu", "name": "Example Core 7 CPU"}],
}
CARD: Json = {
    "id": "cuda:0",
    "name": "Example H9",
    "uuid_sha256": "5" * 64,
    "vram_bytes": 141_000_000_000,
    "driver": "999.1",
    "power_limit_w": 700.0,
}
SERVER: Json = {
    **LAPTOP,
    "cpu": {**LAPTOP["cpu"], "model": "Example Server 99", "physical_cores": 48},
    "ram_bytes": 512_000_000_000,
    "container": "docker",
    "devices": [{"id": "cpu", "name": "Example Server 99"}, CARD],
}
PROTOCOL: Json = {
    "order": "interleaved",
    "seed": 0,
    "fresh_process_per_trial": True,
    "timeout_s": 900.0,
    "decoding": "greedy",
}
PER_LAYER = 3_540_000
REST = 28_315_000


def sha(*words: object) -> str:
    return hashlib.sha256(" ".join(map(str, words)).encode()).hexdigest()


def artifact(label: str, n_layers: int, spec: str = "gguf:Q8_0") -> Json:
    fmt, precision = spec.split(":")
    n_params = n_layers * PER_LAYER + REST
    return {
        "path": f"{label}.{fmt}",
        "spec": {"format": fmt, "precision": precision, "options": {}},
        "n_layers": n_layers,
        "n_params": n_params,
        "size_bytes": n_params,
        "weight_bytes_per_token": n_params,
        "sha256": sha(label, n_layers, spec),
        "source_sha256": sha(label),
        "notes": [],
        "least_runtime": None,
    }


def workload(**changes: Any) -> Json:
    return {
        "prompt_tokens": 128,
        "decode_tokens": 16,
        "warmup_prompt_tokens": 128,
        "warmup_decode_tokens": 8,
        "repeats": 6,
        "memory_repeats": 1,
        "threads": 8,
        "depth_tokens": 0,
        "batch": 1,
        "cooldown_s": 0.0,
        "time_budget_s": None,
        **changes,
    }


def trial(number: int, step_s: float, prefill_s: float, n_steps: int, rng: random.Random) -> Json:
    took = prefill_s * rng.gauss(1, 0.005)
    return {
        "round": number,
        "position": number + 1,
        "started_s": 3.0 * number,
        "load_s": 0.3,
        "load_kind": "cold" if number == 0 else "warm",
        "prefill_s": took,
        "ttft_s": took + 0.0002,
        "decode_step_s": [step_s * rng.gauss(1, 0.005) for _ in range(n_steps)],
        "output_sha256": "e" * 64,
        "conditions": {"before": {"load_average_1min": 0.2}, "foreign_cpu_share": 0.01},
        "warmup": {"steps": 8, "steady": True, "decode_step_s": [step_s] * 8},
        "device_before": {},
        "device_after": {},
    }


def memory_trial(peak_bytes: int, device: str) -> Json:
    usage = {"total_bytes": peak_bytes, "anon_bytes": 50_000_000, "file_bytes": None}
    return {
        "round": 0,
        "position": 0,
        "method": "kernel and sampled",
        "why_no_split": None,
        "n_samples": 100,
        "peak_total_bytes": peak_bytes,
        "peak_anon_bytes": 50_000_000,
        "peak_file_bytes": peak_bytes - 50_000_000,
        "at_peak": usage,
        "baseline": usage,
        "phases": {"load": {"peak": usage, "end": usage}},
        "device_memory": None
        if device == "cpu"
        else {
            "method": "device total over idle",
            "baseline_bytes": 500_000_000,
            "peak_device_bytes": 500_000_000 + peak_bytes,
            "process_bytes": None,
            "allocator_peak_bytes": peak_bytes - 1000,
        },
    }


def measurement(
    label: str,
    n_layers: int,
    spec: str = "gguf:Q8_0",
    *,
    host: Json = LAPTOP,
    device: str = "cpu",
    work: Json | None = None,
    speed: float = 1.0,
    seed: int = 0,
) -> Json:
    """Decode costs 2 ms and half a millisecond a layer, over `speed`."""
    rng = random.Random(f"{label} {n_layers} {spec} {device} {seed}")
    work = work or workload()
    step_s = (0.002 + 0.0005 * n_layers) / speed
    made = artifact(label, n_layers, spec)
    runtime = {"gguf": "llama.cpp", "onnx": "onnxruntime"}[spec.split(":")[0]]
    return {
        "schema": 2,
        "tool_version": "0.1.0",
        "label": label,
        "runtime": runtime,
        "runtime_info": {
            "runtime": runtime,
            "version": "1.31.1",
            "threads": work["threads"],
            "kv_cache": "F16",
        },
        "device": device,
        "device_info": next((d for d in host["devices"] if d["id"] == device), {}),
        "artifact": made,
        "workload": work,
        "prompt_sha256": "d" * 64,
        "prompt_source": "spdx",
        "host": host,
        "protocol": PROTOCOL,
        "trials": [
            trial(n, step_s, 20 * step_s, work["decode_tokens"], rng)
            for n in range(work["repeats"])
        ],
        "memory": [memory_trial(made["size_bytes"] + 80_000_000, device)],
        "failure": None,
        "flags": [],
        "kv_bytes_per_token": 23_040,
        "energy": [] if device == "cpu" else [joules(work["decode_tokens"])],
        "energy_reason": "no counter can be read" if device == "cpu" else None,
    }


def joules(tokens: int) -> Json:
    return {
        "method": "NVML total energy",
        "scope": "gpu",
        "window_s": 12.0,
        "gross_j": 40.0 * tokens,
        "idle_w": 70.0,
        "net_j": 30.0 * tokens,
        "tokens": tokens,
        "phase": "decode",
    }


def bench(
    measurements: Sequence[Json], *, run: str = "1", host: Json = LAPTOP, **changes: Any
) -> Json:
    """A whole bench.json."""
    return copy.deepcopy(
        {
            "schema": 2,
            "kind": "bench",
            "tool_version": "0.1.0",
            "run_id": sha("run", run)[:32],
            "started_at": "2026-11-22T05:30:00Z",
            "finished_at": "2026-11-22T05:40:00Z",
            "command": "shortstack bench original.gguf pruned.gguf -o out",
            "seed": 0,
            "host": host,
            "ceilings": {
                "cpu": {
                    "read_bytes_per_s": 4.0e10,
                    "matmul_flops_per_s": {"float32": 4.0e11},
                    "threads": 8,
                    "method": "sum",
                    "samples": {},
                    "measured_in_s": 2.0,
                }
            },
            "protocol": PROTOCOL,
            "measurements": list(measurements),
            **changes,
        }
    )


def laptop_run(run: str = "laptop") -> Json:
    """Three depths as GGUF, two as ONNX."""
    cases = [measurement(f"cut{n}" if n < 30 else "original", n) for n in (30, 24, 18)]
    cases += [
        measurement(f"cut{n}" if n < 30 else "original", n, "onnx:int8", speed=0.6)
        for n in (30, 24)
    ]
    return bench(cases, run=run)


def server_run(run: str = "server") -> Json:
    """The same GGUF files on a card."""
    cases = [
        measurement(f"cut{n}" if n < 30 else "original", n, host=SERVER, device="cuda:0", speed=9.0)
        for n in (30, 24, 18)
    ]
    return bench(cases, run=run, host=SERVER)


def evaluation(measurements: Sequence[Json], perplexities: Sequence[float]) -> Json:
    """What eval.json of shortstack eval holds of these artifacts, as far as it is read."""
    models = [
        {
            "label": f"model{i}",
            "sha256": m["artifact"]["sha256"],
            "export": None,
            "n_layers": None,
            "size_bytes": 1,
        }
        for i, m in enumerate(measurements)
    ]
    results = [
        {
            "model": f"model{i}",
            "set": "news",
            "kind": "text",
            "summary": {"perplexity": {"estimate": p, "low": p - 0.1, "high": p + 0.1}},
        }
        for i, p in enumerate(perplexities)
    ]
    sets = [{"name": "news", "kind": "text", "metric": "perplexity"}]
    return {"schema": 1, "models": models, "sets": sets, "results": results}


def written(folder: Path, data: Any, name: str = "bench.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(data), encoding="utf-8")
    return folder
