"""Made-up runs whose times follow a known law, so that a fit has a right answer."""

from __future__ import annotations

from typing import Any

GB = 10**9
H200_BANDWIDTH = 4800 * GB
"""As the catalogue has it."""


def a_record(
    *,
    step_s: float,
    weights: float = 13.5 * GB,
    label: str = "original",
    runtime: str = "llama.cpp",
    precision: str = "F16",
    device: str = "cuda:0",
    name: str = "NVIDIA H200",
    kv: int | None = 0,
    overhead: float = 0.5 * GB,
    spread: float = 0.0,
    **workload: int,
) -> dict[str, Any]:
    """A Measurement as its dict, of three trials: the middle one is exactly `step_s` a step."""
    load = {"prompt_tokens": 512, "decode_tokens": 128, "threads": 2, "batch": 1, **workload}
    held = load.get("depth_tokens", 0) + load["prompt_tokens"] + load["decode_tokens"] + 1
    peak = round(weights + (kv or 0) * held * load["batch"] + overhead)
    card = device != "cpu"
    return {
        "label": label,
        "runtime": runtime,
        "device": device,
        "device_info": {"name": name, "vram_bytes": 140 * 2**30} if card else {},
        "host": {"cpu": {"model": "A CPU"}, "ram_bytes": 16 * 2**30},
        "artifact": {
            "sha256": f"{label}{precision}",
            "size_bytes": round(weights),
            "weight_bytes_per_token": round(weights),
            "n_params": 6_700_000_000,
            "spec": {"format": "gguf", "precision": precision, "options": {}},
        },
        "workload": load,
        "kv_bytes_per_token": kv,
        "trials": [
            {"decode_step_s": [step_s * factor] * 4, "prefill_s": 0.025 * factor}
            for factor in (1, 1 + spread, 1 / (1 + spread))
        ],
        "memory": [
            {
                "peak_total_bytes": peak,
                "device_memory": {"peak_device_bytes": peak + GB, "baseline_bytes": GB}
                if card
                else None,
            }
        ],
    }


def a_run(*records: dict[str, Any], read: float | None = None, **more: Any) -> dict[str, Any]:
    """A `bench.json`; `read` is the bandwidth measured for every device in it."""
    ceilings = {
        r["device"]: {
            "read_bytes_per_s": read,
            "matmul_flops_per_s": {"float16": 790e12, "float32": 50e12},
            "threads": None,
            "samples": {},
            **more,
        }
        for r in records
        if read is not None
    }
    return {"run_id": "0123456789abcdef" * 2, "ceilings": ceilings, "measurements": list(records)}


def obeying(
    bandwidth: float, weights: float, overhead_s: float = 0.0002, efficiency: float = 0.6
) -> float:
    """Seconds a step of the law that the projection assumes."""
    return overhead_s + weights / (efficiency * bandwidth)
