"""One measurement and the figures drawn from its raw samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from shortstack.devices.record_fields import MeasurementRecord
from shortstack.devices.records import Record
from shortstack.devices.report.merged.machines import Place
from shortstack.devices.report.view import FORMATS
from shortstack.devices.stats import median


@dataclass(frozen=True)
class Shape:
    """How many tokens a trial works on, with which options: what a figure holds for."""

    prompt_tokens: int
    decode_tokens: int
    depth_tokens: int
    batch: int
    options: tuple[tuple[str, str], ...] = ()
    """The runtime's, as asked for, by name: `(("kv_type", "q8_0"),)`."""

    @property
    def words(self) -> str:
        parts = [f"prompt {self.prompt_tokens}", f"decode {self.decode_tokens}"]
        parts += [f"depth {self.depth_tokens}"] if self.depth_tokens else []
        parts += [f"batch {self.batch}"] if self.batch > 1 else []
        return ", ".join([*parts, *(f"{name} {value}" for name, value in self.options)])


@dataclass(frozen=True)
class Case:
    """A measurement, the place it ran at and the run it belongs to (counted from 1)."""

    record: Record
    measurement: MeasurementRecord
    place: Place
    run: int

    @property
    def label(self) -> str:
        return self.measurement.label

    @property
    def runtime(self) -> str:
        return self.measurement.runtime

    @property
    def n_layers(self) -> int:
        return self.measurement.artifact.n_layers

    @property
    def sha256(self) -> str:
        return self.measurement.artifact.sha256

    @cached_property
    def export(self) -> str:
        """`GGUF Q8_0`, `GGUF Q4_0, head q6_k`."""
        spec = self.measurement.artifact.spec
        options = [f"{key} {value}" for key, value in spec.options.items()]
        return ", ".join([f"{FORMATS.get(spec.format, spec.format)} {spec.precision}", *options])

    @property
    def title(self) -> str:
        return f"{self.label}, {self.export}, {self.n_layers} layers"

    @cached_property
    def shape(self) -> Shape:
        w, options = self.measurement.workload, sorted(self.measurement.options.items())
        return Shape(w.prompt_tokens, w.decode_tokens, w.depth_tokens, w.batch, tuple(options))

    @cached_property
    def decode_tokens_per_s(self) -> tuple[float, ...]:
        """One a trial: steps over the time of the steps, times the batch."""
        batch = self.shape.batch
        return tuple(
            batch * len(t.decode_step_s) / sum(t.decode_step_s) for t in self.measurement.trials
        )

    @cached_property
    def decode_ms(self) -> tuple[float, ...]:
        """One a trial: mean time of a step (TPOT), in milliseconds."""
        trials = self.measurement.trials
        return tuple(1e3 * sum(t.decode_step_s) / len(t.decode_step_s) for t in trials)

    @cached_property
    def prefill_tokens_per_s(self) -> tuple[float, ...]:
        tokens = self.shape.batch * self.shape.prompt_tokens
        return tuple(tokens / t.prefill_s for t in self.measurement.trials)

    @property
    def ttft_ms(self) -> tuple[float, ...]:
        return tuple(1e3 * t.ttft_s for t in self.measurement.trials)

    def load_s(self, kind: str) -> tuple[float, ...]:
        return tuple(t.load_s for t in self.measurement.trials if t.load_kind == kind)

    @property
    def peak_rss_bytes(self) -> float | None:
        return _median([m.peak_total_bytes for m in self.measurement.memory])

    def resident(self, name: str) -> float | None:
        """Median of `peak_anon_bytes` or `peak_file_bytes`; None where one trial has none."""
        return _median([getattr(m, name) for m in self.measurement.memory])

    def device_memory(self, name: str) -> float | None:
        """Median of a field of `device_memory`; `delta_bytes`: peak over the idle baseline."""
        found = [m.device_memory for m in self.measurement.memory if m.device_memory]
        if name == "delta_bytes":
            return _median([max(0, m.peak_device_bytes - m.baseline_bytes) for m in found])
        return _median([getattr(m, name) for m in found])

    @property
    def peak_bytes(self) -> float | None:
        """Memory of the device that the model needed: resident on a CPU, the delta on others."""
        if self.place.device == "cpu":
            return self.peak_rss_bytes
        return self.device_memory("delta_bytes")


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known and len(known) == len(values) else None
