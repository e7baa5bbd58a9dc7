"""One line a measurement as CSV: medians and intervals, units in the names."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from shortstack.devices.report.merged.cases import Case
from shortstack.devices.report.merged.matrix import Row
from shortstack.devices.report.merged.merge import Merged
from shortstack.devices.report.merged.unlike import runtime_major
from shortstack.devices.stats import median_interval

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for the beginning of a formula."""


def to_csv(merged: Merged, rows: Sequence[Row]) -> str:
    """`not_comparable` says why a line must not stand beside the others of its row."""
    reasons = {id(case): row.reasons(case) for row in rows for case in row.cases}
    lines = [_line(merged, case, reasons[id(case)]) for case in merged.cases]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _plain(value) for key, value in line.items()} for line in lines)
    return out.getvalue()


def _line(merged: Merged, case: Case, reasons: Sequence[str]) -> dict[str, Any]:
    m, w = case.measurement, case.measurement.workload
    verdict = merged.verdict(case)
    return {
        "run_id": case.record.run_id,
        "machine": case.place.machine,
        "device": case.place.name,
        "device_id": m.device,
        "label": m.label,
        "format": m.artifact.spec.format,
        "export": case.export,
        "n_layers": m.artifact.n_layers,
        "n_params": m.artifact.n_params,
        "size_bytes": m.artifact.size_bytes,
        "weight_bytes_per_token": m.artifact.weight_bytes_per_token,
        "kv_bytes_per_token": m.kv_bytes_per_token,
        "artifact_sha256": m.artifact.sha256,
        "runtime": m.runtime,
        "runtime_version": m.runtime_info.get("version"),
        "runtime_major": runtime_major(m),
        "options": ", ".join(f"{name} {value}" for name, value in case.shape.options),
        "kv_cache": m.runtime_info.get("kv_cache"),
        "threads": w.threads,
        "prompt_tokens": w.prompt_tokens,
        "decode_tokens": w.decode_tokens,
        "depth_tokens": w.depth_tokens,
        "batch": w.batch,
        "prompt_sha256": m.prompt_sha256,
        "trials": len(m.trials),
        **_figures("prefill_tokens_per_s", case.prefill_tokens_per_s),
        **_figures("ttft_ms", case.ttft_ms),
        **_figures("decode_tokens_per_s", case.decode_tokens_per_s),
        **_figures("decode_step_ms", case.decode_ms),
        "peak_rss_bytes": case.peak_rss_bytes,
        "peak_anon_bytes": case.resident("peak_anon_bytes"),
        "peak_file_bytes": case.resident("peak_file_bytes"),
        "device_delta_bytes": case.device_memory("delta_bytes"),
        "device_process_bytes": case.device_memory("process_bytes"),
        "device_allocator_bytes": case.device_memory("allocator_peak_bytes"),
        "quality": None if verdict is None else verdict.value,
        "quality_metric": None if merged.quality is None else merged.quality.metric,
        **_energy(case),
        "flags": "; ".join(m.flags),
        "failure": None if m.failure is None else m.failure.message,
        "not_comparable": "; ".join(reasons),
    }


def _figures(name: str, values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    found = median_interval(values)
    return {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high}


def _energy(case: Case) -> dict[str, float | None]:
    """Of the device itself; of two scopes the first."""
    found: dict[str, float | None] = {}
    for phase in ("prefill", "decode"):
        e = next((e for e in case.measurement.energy if e.phase == phase), None)
        net = None if e is None else e.net_j
        found[f"{phase}_gross_j_per_token"] = None if e is None else e.gross_j / e.tokens
        found[f"{phase}_net_j_per_token"] = None if e is None or net is None else net / e.tokens
    return found


def _plain(value: Any) -> Any:
    """Words as words: what a spreadsheet would compute gets a leading apostrophe."""
    if isinstance(value, str) and value.startswith(FORMULA):
        return "'" + value
    return value
