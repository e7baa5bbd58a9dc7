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

SCHEMA = 1
NOISY_SPREAD = 0.05
BUSY_SHARE = 0.10
SURE_REPEATS = 6
"""From so many on, the range of the rounds covers the median with at least 95 %."""


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

    @property
    def decode_tokens_per_s(self) -> float:
        """Steps over the time of the steps: 1 / TPOT."""
        return len(self.decode_step_s) / sum(self.decode_step_s)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trial:
        return cls(**{**data, "decode_step_s": tuple(data["decode_step_s"])})


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
        return tuple(self.workload.prompt_tokens / t.prefill_s for t in self.trials)

    @property
    def decode_tokens_per_s(self) -> tuple[float, ...]:
        return tuple(t.decode_tokens_per_s for t in self.trials)

    @property
    def flags(self) -> tuple[str, ...]:
        """What a reader must know before trusting the figures."""
        return tuple(_flags(self))

    def to_dict(self) -> dict[str, Any]:
        data = dataclasses.asdict(dataclasses.replace(self, artifact=None))  # type: ignore[arg-type]  # it writes itself
        data["artifact"] = self.artifact.to_dict()
        data["flags"] = list(self.flags)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], folder: Path = Path()) -> Measurement:
        """Read what `to_dict` wrote; `folder` is where the artifact lies now."""
        if data.get("schema") != SCHEMA:
            raise ShortstackError(
                f"this measurement has schema {data.get('schema')!r}, this shortstack reads "
                f"{SCHEMA}. Update shortstack, or measure again."
            )
        try:
            rest = {k: v for k, v in data.items() if k != "flags"}
            rest["artifact"] = Artifact.from_dict(data["artifact"], folder)
            rest["workload"] = Workload.from_dict(data["workload"])
            rest["trials"] = tuple(Trial.from_dict(t) for t in data["trials"])
            rest["memory"] = tuple(MemoryTrial(**m) for m in data["memory"])
            rest["failure"] = Failure(**data["failure"]) if data["failure"] else None
            return cls(**rest)
        except (KeyError, TypeError) as error:
            raise ShortstackError(f"this measurement is damaged: {error}. Measure again.") from None


def _flags(measurement: Measurement) -> list[str]:
    from shortstack.devices.stats import spread

    flags = []
    trials = measurement.trials
    if trials and len(trials) < measurement.workload.repeats:
        flags.append(f"only {len(trials)} of {measurement.workload.repeats} trials")
    if trials and measurement.workload.repeats < SURE_REPEATS:
        flags.append(
            f"few repeats: intervals of {measurement.workload.repeats} rounds are their range and "
            "cover less than 95 %"
        )
    rates = measurement.decode_tokens_per_s
    if len(rates) > 1 and (cv := spread(rates)) > NOISY_SPREAD:
        flags.append(f"noisy: decode speed varies by {100 * cv:.0f} % between trials")
    shares = [s for t in trials if (s := t.conditions.get("foreign_cpu_share")) is not None]
    if shares and max(shares) > BUSY_SHARE:
        flags.append(f"busy: other processes took up to {100 * max(shares):.0f} % of the CPU")
    if len({t.output_sha256 for t in trials}) > 1:
        flags.append("unsteady: greedy decoding gave other tokens in other trials")
    return flags
