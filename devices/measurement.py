"""The record of one artifact in one runtime on one machine. docs/records.md defines each field."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortstack import __version__
from shortstack.artifact import Artifact
from shortstack.devices.workload import Workload
from shortstack.errors import ShortstackError

SCHEMA = 2
READABLE = (1, 2)
"""Schema 1 lacks only what has a default now."""


def _known(kind: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that `kind` has: a record may carry more (docs/schema)."""
    names = {one.name for one in dataclasses.fields(kind)}
    return {name: value for name, value in data.items() if name in names}


@dataclass(frozen=True)
class Trial:
    """One timed run in its own process. Raw: nothing here is averaged."""

    round: int
    position: int
    """Place among all trials of the campaign, memory trials included."""
    started_s: float
    """Since the campaign began."""
    load_s: float
    prefill_s: float
    ttft_s: float
    decode_step_s: tuple[float, ...]
    output_sha256: str
    """Of the tokens that came out: greedy decoding must repeat itself."""
    conditions: Mapping[str, Any]
    load_kind: str = "warm"
    """warm: the artifact was in the page cache. cold: its pages were dropped first."""
    warmup: Mapping[str, Any] = field(default_factory=dict)
    """`steps`, `steady` (whether the last windows agreed), `decode_step_s`."""
    device_before: Mapping[str, Any] = field(default_factory=dict)
    device_after: Mapping[str, Any] = field(default_factory=dict)
    """Clocks, temperature, throttle reasons, power of an accelerator; empty on the CPU."""

    @property
    def decode_tokens_per_s(self) -> float:
        """Steps over the time of the steps: 1 / TPOT. Of one sequence, whatever the batch."""
        return len(self.decode_step_s) / sum(self.decode_step_s)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trial:
        return cls(**{**_known(cls, data), "decode_step_s": tuple(data["decode_step_s"])})


@dataclass(frozen=True)
class MemoryTrial:
    """One run watched for memory, not timed."""

    round: int
    position: int
    method: str
    why_no_split: str | None
    n_samples: int
    peak_total_bytes: int
    peak_anon_bytes: int | None
    peak_file_bytes: int | None
    at_peak: Mapping[str, int | None]
    """Anonymous and file-backed at the sampled moment of the largest total: these do add up."""
    baseline: Mapping[str, int | None]
    phases: Mapping[str, Mapping[str, Mapping[str, int | None]]]
    device_memory: Mapping[str, Any] | None = None
    """Of an accelerator: `method`, `baseline_bytes`, `peak_device_bytes`, `process_bytes`,
    `allocator_peak_bytes`."""


@dataclass(frozen=True)
class Failure:
    """Why a case has no figures, or fewer than asked for."""

    kind: str
    """signal, timeout, exit (a bug or an abort), error (a message that says what to do)."""
    message: str
    phase: str
    signal_name: str | None = None
    round: int | None = None


@dataclass(frozen=True)
class Measurement:
    """Everything measured for one case. Frozen; JSON round trip by `to_dict` and `from_dict`."""

    label: str
    runtime: str
    artifact: Artifact
    workload: Workload
    prompt_sha256: str
    prompt_source: str
    host: Mapping[str, Any]
    protocol: Mapping[str, Any]
    trials: tuple[Trial, ...] = ()
    memory: tuple[MemoryTrial, ...] = ()
    runtime_info: Mapping[str, Any] = field(default_factory=dict)
    failure: Failure | None = None
    device: str = "cpu"
    device_info: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    """The runtime's, as they were asked for: `kv_type`, `gpu_layers`, ..."""
    kv_bytes_per_token: int | None = None
    """Of one sequence, from the model's shape and the type of the cache."""
    energy: tuple[Mapping[str, Any], ...] = ()
    energy_reason: str | None = None
    tool_version: str = __version__
    schema: int = SCHEMA

    @property
    def load_s(self) -> tuple[float, ...]:
        return tuple(t.load_s for t in self.trials)

    @property
    def ttft_s(self) -> tuple[float, ...]:
        return tuple(t.ttft_s for t in self.trials)

    @property
    def prefill_s(self) -> tuple[float, ...]:
        return tuple(t.prefill_s for t in self.trials)

    @property
    def decode_step_s(self) -> tuple[tuple[float, ...], ...]:
        return tuple(t.decode_step_s for t in self.trials)

    @property
    def prefill_tokens_per_s(self) -> tuple[float, ...]:
        """Of all sequences of the batch together."""
        tokens = self.workload.prompt_tokens * self.workload.batch
        return tuple(tokens / t.prefill_s for t in self.trials)

    @property
    def decode_tokens_per_s(self) -> tuple[float, ...]:
        """Of all sequences of the batch together."""
        return tuple(self.workload.batch * t.decode_tokens_per_s for t in self.trials)

    @property
    def flags(self) -> tuple[str, ...]:
        """What a reader must know before trusting the figures."""
        from shortstack.devices.flags import flags

        return tuple(flags(self))

    def to_dict(self) -> dict[str, Any]:
        data = dataclasses.asdict(dataclasses.replace(self, artifact=None))  # type: ignore[arg-type]  # it writes itself
        data["artifact"] = self.artifact.to_dict()
        data["flags"] = list(self.flags)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], folder: Path = Path()) -> Measurement:
        """Read what `to_dict` wrote; `folder` is where the artifact lies now."""
        if data.get("schema") not in READABLE:
            raise ShortstackError(
                f"this measurement has schema {data.get('schema')!r}, this shortstack reads "
                f"{' and '.join(map(str, READABLE))}. Update shortstack, or measure again."
            )
        try:
            rest = {k: v for k, v in _known(cls, data).items() if k != "schema"}
            rest["artifact"] = Artifact.from_dict(_known(Artifact, data["artifact"]), folder)
            rest["workload"] = Workload.from_dict(_known(Workload, data["workload"]))
            rest["trials"] = tuple(Trial.from_dict(t) for t in data["trials"])
            rest["memory"] = tuple(MemoryTrial(**_known(MemoryTrial, m)) for m in data["memory"])
            rest["energy"] = tuple(data.get("energy", ()))
            failure = data["failure"]
            rest["failure"] = Failure(**_known(Failure, failure)) if failure else None
            return cls(**rest)
        except (KeyError, TypeError, AttributeError) as error:
            raise ShortstackError(f"this measurement is damaged: {error}. Measure again.") from None
