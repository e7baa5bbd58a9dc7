"""Which machines hold a model at a context: what it needs, what there is, what stays free."""

from __future__ import annotations

from dataclasses import dataclass

from shortstack.devices.fit import weight_bytes
from shortstack.devices.roofline.share import Record, batch, device_kind
from shortstack.devices.stats import median
from shortstack.errors import ShortstackError

GIB = 2**30
HEADROOM = {"gpu": (GIB, 0.075), "cpu": (2 * GIB, 0.2), "unified": (2 * GIB, 1 / 3)}
"""Kind of device -> the least bytes and the part of its memory that a model cannot have.

A card: the driver's context, a screen, ECC on cards that keep it in their memory (6 % of an L4's).
A computer: the system and a browser. Unified memory: by default macOS lets the GPU have two thirds.
"""


@dataclass(frozen=True)
class Target:
    """A model to place: an artifact at a context of `context_tokens`, `batch` sequences."""

    label: str
    runtime: str
    sha256: str
    size_bytes: int
    """Of the weights as they are held while they run."""
    weight_bytes_per_token: int
    kv_bytes_per_token: int | None
    context_tokens: int
    batch: int = 1

    def __post_init__(self) -> None:
        for name in ("size_bytes", "weight_bytes_per_token", "context_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ShortstackError(
                    f"{self.label}: {name} is {getattr(self, name)}, it must be from 1 up."
                )

    @property
    def cache_bytes(self) -> int | None:
        """The KV cache of all sequences at the full context; None where a token's is unknown."""
        if self.kv_bytes_per_token is None:
            return None
        return self.kv_bytes_per_token * self.context_tokens * self.batch

    @property
    def step_bytes(self) -> int:
        """What one decode step at the full context reads; weights alone where the cache's bytes
        are unknown."""
        return self.weight_bytes_per_token + (self.cache_bytes or 0)


@dataclass(frozen=True)
class Need:
    """Bytes that running a target takes; `overhead_bytes` is what records showed beyond weights
    and cache."""

    weights_bytes: int
    cache_bytes: int
    overhead_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.overhead_bytes


@dataclass(frozen=True)
class Fit:
    """Whether it fits: `need_bytes` into `have_bytes` less `headroom_bytes`."""

    need_bytes: int
    have_bytes: int
    headroom_bytes: int
    rule: str

    @property
    def usable_bytes(self) -> int:
        return max(0, self.have_bytes - self.headroom_bytes)

    @property
    def spare_bytes(self) -> int:
        """What stays; below 0: what is missing."""
        return self.usable_bytes - self.need_bytes

    @property
    def fits(self) -> bool:
        return self.spare_bytes >= 0


def fits(need_bytes: int, have_bytes: int, kind: str) -> Fit:
    """Whether a device of that memory and kind (gpu, cpu, unified) holds what is needed."""
    least, part = HEADROOM[kind]
    rule = f"{kind}: {least / GIB:g} GiB or {100 * part:.3g} %, whichever is more, stays free"
    return Fit(need_bytes, have_bytes, max(least, int(part * have_bytes)), rule)


def need(target: Target, overhead_bytes: float) -> Need | None:
    """What the target takes; None where its cache's bytes are unknown. An overhead below 0 (pages
    of a mapped file that were never touched) counts as none: they may be touched yet."""
    if target.cache_bytes is None:
        return None
    return Need(target.size_bytes, target.cache_bytes, max(0, round(overhead_bytes)))


def target(record: Record, context_tokens: int | None = None) -> Target:
    """The record's artifact at `context_tokens`, else at the context it was measured with."""
    artifact = record["artifact"]
    return Target(
        label=record["label"],
        runtime=record["runtime"],
        sha256=artifact["sha256"],
        size_bytes=weight_bytes(artifact),
        weight_bytes_per_token=artifact["weight_bytes_per_token"],
        kv_bytes_per_token=record.get("kv_bytes_per_token"),
        context_tokens=held_tokens(record) if context_tokens is None else context_tokens,
        batch=batch(record),
    )


def held_tokens(record: Record) -> int:
    """Tokens that the run's cache had to hold in the end: depth, prompt, the first one, decoded."""
    w = record["workload"]
    return int(w.get("depth_tokens", 0) + w["prompt_tokens"] + w["decode_tokens"] + 1)


def peak_bytes(record: Record) -> float | None:
    """Median over memory trials of the most that the run held: on the CPU of its process, on a
    card over the idle baseline. None where that was not measured."""
    peaks: list[float] = []
    for trial in record.get("memory", ()):
        if device_kind(record.get("device", "cpu")) != "gpu":
            peaks.append(trial["peak_total_bytes"])
        elif card := trial.get("device_memory"):
            peaks.append(card["peak_device_bytes"] - card["baseline_bytes"])
    return median(peaks) if peaks else None


def overhead_bytes(record: Record) -> float | None:
    """What the run held beyond its weights and its cache; may be below 0 where a mapped file was
    not read in whole. None where memory was not measured or the cache's bytes are unknown."""
    own, peak = target(record), peak_bytes(record)
    if peak is None or own.cache_bytes is None:
        return None
    return peak - own.size_bytes - own.cache_bytes
