"""The same figures in the shape of llama-bench, for scripts that read `llama-bench -o json`.

Field names and their order: llama.cpp, tools/llama-bench/llama-bench.cpp, `test::get_fields`, and
README.md there; `use_mmap` is of builds before `load_mode`. scripts/compare-llama-bench.py joins
rows by equality, which null never meets, so what a record does not tell is 0 or empty, or auto (-1)
where 0 says no.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from shortstack.devices.report.markdown import md
from shortstack.devices.report.merged.cases import Case
from shortstack.devices.report.merged.machines import part

FLASH = {"on": 1, "off": 0, True: 1, False: 0}
AUTO = -1
"""`flash_attn` as llama.h numbers it: on, off, or as the runtime likes; `n_gpu_layers`: all."""
GGML_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
BACKENDS = {"cpu": "CPU", "cuda": "CUDA", "metal": "Metal", "vulkan": "Vulkan", "rocm": "ROCm"}
"""Kind of device -> backend, where the runtime does not say."""


def llama_bench_rows(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Two rows a case, as llama-bench tests apart: `pp` (the prompt) and `tg` (decode).

    Of batch 1 only: llama-bench's `n_batch` is how a prompt is cut up, not how many run at once.
    """
    return [row for case in cases if _fits(case) for row in _rows(case)]


def left_out(cases: Sequence[Case]) -> list[Case]:
    """What that shape has no place for."""
    return [case for case in cases if case.measurement.trials and not _fits(case)]


def llama_bench_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown as `llama-bench -o md` prints it; the machine is added, as there are several."""
    lines = ["| model | size | params | backend | threads | machine | test | t/s |"]
    lines.append("| --- | ---: | ---: | --- | ---: | --- | ---: | ---: |")
    for row in rows:
        cells = (
            row["model_type"],
            _size(row["model_size"]),
            _params(row["model_n_params"]),
            row["backends"],
            str(row["n_threads"]),
            row["gpu_info"] or row["cpu_info"],
            test_name(row),
            f"{row['avg_ts']:.2f} \N{PLUS-MINUS SIGN} {row['stddev_ts']:.2f}",
        )
        lines.append("| " + " | ".join(map(md, cells)) + " |")
    return "\n".join(lines)


def test_name(row: dict[str, Any]) -> str:
    """`pp128`, `tg64 @ d128`."""
    kind = f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}"
    return kind + (f" @ d{row['n_depth']}" if row["n_depth"] else "")


def _fits(case: Case) -> bool:
    return bool(case.measurement.trials) and case.shape.batch == 1


def _rows(case: Case) -> Iterator[dict[str, Any]]:
    trials, shape = case.measurement.trials, case.shape
    head = _head(case)
    prompt = [_ns(t.prefill_s) for t in trials]
    yield {
        **head,
        **_test(shape.prompt_tokens, 0, shape.depth_tokens),
        **_times(case, prompt, shape.prompt_tokens),
    }
    # Every step sees at least the prompt: llama-bench calls that its depth.
    steps = len(trials[0].decode_step_s)
    decode = [_ns(sum(t.decode_step_s)) for t in trials]
    yield {
        **head,
        **_test(0, steps, shape.depth_tokens + shape.prompt_tokens),
        **_times(case, decode, steps),
    }


def _test(n_prompt: int, n_gen: int, n_depth: int) -> dict[str, int]:
    return {"n_prompt": n_prompt, "n_gen": n_gen, "n_depth": n_depth}


def _head(case: Case) -> dict[str, Any]:
    m = case.measurement
    info, artifact = m.runtime_info, m.artifact
    gpu = m.device != "cpu"
    kind = m.device.partition(":")[0]
    cache = str(info.get("kv_cache") or "").lower()
    cache = GGML_TYPES.get(cache, cache)
    mapped = info.get("mmap")
    return {
        "build_commit": str(info.get("build_commit") or f"{m.runtime} {info.get('version', '')}"),
        "build_number": _whole(info.get("build_number")),
        "cpu_info": str(part(m.host, "cpu").get("model") or ""),
        "gpu_info": str(m.device_info.get("name") or case.place.name) if gpu else "",
        "backends": str(info.get("backend") or BACKENDS.get(kind, kind)),
        "model_filename": artifact.path.replace("\\", "/").rpartition("/")[2],
        "model_type": f"{case.label} {case.export} ({artifact.n_layers} layers, {m.runtime})",
        "model_size": artifact.size_bytes,
        "model_n_params": artifact.n_params,
        "n_batch": _whole(info.get("n_batch")),
        "n_ubatch": _whole(info.get("n_ubatch")),
        "n_threads": _whole(info.get("threads")) or m.workload.threads,
        "cpu_mask": "",
        "cpu_strict": False,
        "poll": 0,
        "type_k": cache,
        "type_v": cache,
        "n_gpu_layers": _whole(info.get("n_gpu_layers"), AUTO if gpu else 0),
        "n_cpu_moe": 0,
        "split_mode": "",
        "main_gpu": 0,
        "no_kv_offload": False,
        "flash_attn": _flash(info.get("flash_attention")),
        "devices": "",
        "tensor_split": "",
        "tensor_buft_overrides": "",
        "use_mmap": mapped if isinstance(mapped, bool) else "",
        "load_mode": "",
        "embeddings": False,
        "no_op_offload": 0,
        "no_host": False,
        "fit_target": 0,
        "fit_min_ctx": 0,
    }


def _times(case: Case, samples_ns: Sequence[int], tokens: int) -> dict[str, Any]:
    """Means and sample deviations, as llama-bench takes them; medians are in the report."""
    samples_ts = [1e9 * tokens / ns for ns in samples_ns]
    return {
        "test_time": case.record.started_at or "",
        "avg_ns": round(statistics.fmean(samples_ns)),
        "stddev_ns": round(_deviation(samples_ns)),
        "avg_ts": statistics.fmean(samples_ts),
        "stddev_ts": _deviation(samples_ts),
        "samples_ns": list(samples_ns),
        "samples_ts": samples_ts,
    }


def _ns(seconds: float) -> int:
    return max(1, round(1e9 * seconds))


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _whole(value: Any, unknown: int = 0) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else unknown


def _flash(value: Any) -> int:
    return FLASH.get(value, AUTO) if isinstance(value, str | bool) else AUTO


def _size(n_bytes: int) -> str:
    """Binary units, as there."""
    gib = n_bytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 1 else f"{n_bytes / 2**20:.2f} MiB"


def _params(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
