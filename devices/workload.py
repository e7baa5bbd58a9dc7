"""What one trial runs: so many prompt tokens, so many decode steps, on so many threads."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shortstack.devices.host import usable_cores
from shortstack.errors import ShortstackError

LEAST = {
    "depth_tokens": 0,
    "batch": 1,
    "prompt_tokens": 1,
    "decode_tokens": 2,
    "warmup_prompt_tokens": 1,
    "warmup_decode_tokens": 0,
    "repeats": 1,
    "memory_repeats": 0,
    "threads": 1,
}

CPU_WARMUP_TOKENS = 1024
"""The longest warm-up prompt on the CPU, where a second prompt of 8k tokens would double what a
trial takes; by then caches, threads and pages of the file are warm."""


def warmup_tokens(prompt_tokens: int, device: str) -> int:
    """How much of a prompt warms up: all of it, as llama-bench does; on the CPU at most
    CPU_WARMUP_TOKENS. Cards choose their kernels by the shape, and what the warm-up leaves
    untouched of cache and buffers is touched first while the clock runs."""
    return min(prompt_tokens, CPU_WARMUP_TOKENS) if device == "cpu" else prompt_tokens


@dataclass(frozen=True)
class Workload:
    """Fixed token counts, so that two models do the same work. Checks itself."""

    prompt_tokens: int = 128
    decode_tokens: int = 64
    """Timed decode steps; the first token comes from the prefill and is not one of them."""
    warmup_prompt_tokens: int = 128
    """Warm-up prefills this much of the prompt, or all of it where it is shorter."""
    warmup_decode_tokens: int = 64
    """Warm-up decodes until it is steady, at most so many steps."""
    repeats: int = 6
    memory_repeats: int = 2
    threads: int = field(default_factory=usable_cores)
    depth_tokens: int = 0
    """Put into the cache before the prompt, untimed: prefill and decode happen behind them."""
    batch: int = 1
    """Sequences that run side by side."""
    cooldown_s: float = 0.0
    """Pause between trials."""
    time_budget_s: float | None = None
    """No round starts later than this after the campaign began, but for the first timed one."""

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ShortstackError(
                    f"workload: {name} is {value!r}, it must be a whole number from {least} up."
                )
        _check_seconds("cooldown_s", self.cooldown_s)
        if self.time_budget_s is not None:
            _check_seconds("time_budget_s", self.time_budget_s)

    @property
    def input_tokens(self) -> int:
        """What a prompt holds: the tokens of the depth, then those that are timed."""
        return self.depth_tokens + self.prompt_tokens

    @property
    def context_tokens(self) -> int:
        """What each sequence must hold: depth, prompt, the first token, every decoded one."""
        warmup = min(self.warmup_prompt_tokens, self.input_tokens) + self.warmup_decode_tokens
        return max(self.input_tokens + self.decode_tokens, warmup) + 1

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Workload:
        return cls(**data)


def _check_seconds(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= float(value) < math.inf:  # type: ignore[arg-type]  # number says so
        raise ShortstackError(f"workload: {name} is {value!r}, it must be seconds from 0 up.")


@dataclass(frozen=True)
class Prompt:
    """Token ids of real text. Records carry their hash, never the text."""

    tokens: tuple[int, ...]
    source: str

    @property
    def sha256(self) -> str:
        """Hash of the ids as little-endian 32-bit numbers."""
        raw = b"".join(token.to_bytes(4, "little") for token in self.tokens)
        return hashlib.sha256(raw).hexdigest()
