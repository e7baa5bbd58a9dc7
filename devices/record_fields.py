"""The fields of a record as they are read: docs/schema/bench-2.schema.json as code.

A test holds the two together. Fields that are not named here are left alone, so that a record may
carry more.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from shortstack.devices.measurement import SCHEMA

LARGEST = 2**53
"""Whole numbers above this are no longer exact in JSON readers that have floats only."""
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Seconds = Annotated[float, Field(ge=1e-9, le=1e9)]
"""A time that was measured: no clock tells less than a nanosecond."""
Rate = Annotated[float, Field(ge=1, le=1e24)]
"""Bytes or operations a second that were measured."""


class Checked(BaseModel):
    """Types as written (no "3" for 3), numbers finite, values frozen."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class SpecRecord(Checked):
    format: str
    precision: str
    options: dict[str, str] = {}


class ArtifactRecord(Checked):
    path: str
    spec: SpecRecord
    n_layers: Positive
    n_params: Count
    size_bytes: Positive
    weight_bytes_per_token: Positive
    sha256: str
    source_sha256: str
    notes: list[str] = []
    matmul_params: Count | None = None
    head_params: Count | None = None


class WorkloadRecord(Checked):
    prompt_tokens: Positive
    decode_tokens: Positive
    warmup_prompt_tokens: Positive
    warmup_decode_tokens: Count
    repeats: Positive
    memory_repeats: Count
    threads: Positive
    depth_tokens: Count = 0
    batch: Positive = 1
    cooldown_s: float = Field(0.0, ge=0)
    time_budget_s: float | None = None


class TrialRecord(Checked):
    round: int
    position: int
    started_s: float
    load_s: float = Field(ge=0)
    prefill_s: Seconds
    ttft_s: Seconds
    decode_step_s: list[Seconds] = Field(min_length=1)
    output_sha256: str
    conditions: dict[str, Any]
    load_kind: str = "warm"
    warmup: dict[str, Any] = {}
    device_before: dict[str, Any] = {}
    device_after: dict[str, Any] = {}


class DeviceMemoryRecord(Checked):
    method: str
    baseline_bytes: Count
    peak_device_bytes: Count
    process_bytes: Count | None = None
    allocator_peak_bytes: Count | None = None


class MemoryRecord(Checked):
    round: int
    position: int
    method: str
    why_no_split: str | None
    n_samples: int
    peak_total_bytes: Count
    peak_anon_bytes: Count | None
    peak_file_bytes: Count | None
    at_peak: dict[str, int | None]
    baseline: dict[str, int | None]
    phases: dict[str, Any]
    device_memory: DeviceMemoryRecord | None = None


class EnergyRecord(Checked):
    method: str
    scope: str
    window_s: Seconds
    gross_j: float
    idle_w: float | None
    net_j: float | None
    tokens: Positive
    phase: str


class FailureRecord(Checked):
    kind: str
    message: str
    phase: str
    signal_name: str | None = None
    round: int | None = None


class MeasurementRecord(Checked):
    schema_: int = Field(1, alias="schema", ge=1, le=SCHEMA)
    tool_version: str
    label: str
    runtime: str
    runtime_info: dict[str, Any]
    device: str
    device_info: dict[str, Any] = {}
    options: dict[str, str] = {}
    artifact: ArtifactRecord
    workload: WorkloadRecord
    prompt_sha256: str
    prompt_source: str
    host: dict[str, Any]
    protocol: dict[str, Any]
    trials: list[TrialRecord]
    memory: list[MemoryRecord]
    failure: FailureRecord | None
    flags: list[str] = []
    kv_bytes_per_token: Count | None = None
    energy: list[EnergyRecord] = []
    energy_reason: str | None = None


class ReadSamplesRecord(Checked, extra="allow"):
    cache_bytes: Count | None = None


class CeilingSamplesRecord(Checked, extra="allow"):
    read: ReadSamplesRecord = ReadSamplesRecord()
    foreign_cpu_share: float | None = Field(None, ge=0, le=1)


class CeilingRecord(Checked, extra="allow"):
    """What shares and projections divide by."""

    read_bytes_per_s: Rate
    matmul_flops_per_s: dict[str, Rate]
    threads: Positive | None = None
    method: str = ""
    samples: CeilingSamplesRecord = CeilingSamplesRecord()
    measured_in_s: float = Field(0, ge=0)


class BenchRecord(Checked):
    """The whole of bench.json."""

    schema_: int = Field(alias="schema", ge=SCHEMA, le=SCHEMA)
    kind: str = Field(pattern="^bench$")
    tool_version: str
    run_id: str = Field(pattern="^[0-9a-f]{32}$")
    started_at: str
    finished_at: str | None
    command: str
    seed: int
    host: dict[str, Any]
    ceilings: dict[str, CeilingRecord]
    protocol: dict[str, Any]
    measurements: list[MeasurementRecord]


class EntryRecord(Checked):
    """What is read of an entry of report.json."""

    label: str
    spec: str
    runtime: str
    verification: dict[str, Any] | None
    measurement: MeasurementRecord | None
    failure: str | None


class RunRecord(Checked):
    """What is read of report.json."""

    tool_version: str
    created_at: str | None
    command: str | None
    host: dict[str, Any]
    quality: dict[str, Any] | None
    entries: list[EntryRecord]
