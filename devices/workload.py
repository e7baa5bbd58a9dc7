"""What one trial runs: so many prompt tokens, so many decode steps, on so many threads."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shortstack.devices.host import usable_cores
from shortstack.errors import ShortstackError

LEAST = {
    "prompt_tokens": 1,
    "decode_tokens": 2,
    "warmup_prompt_tokens": 1,
    "warmup_decode_tokens": 0,
    "repeats": 1,
    "memory_repeats": 0,
    "threads": 1,
}


@dataclass(frozen=True)
class Workload:
    """Fixed token counts, so that two models do the same work. Checks itself."""

    prompt_tokens: int = 128
    decode_tokens: int = 64
    """Timed decode steps; the first token comes from the prefill and is not one of them."""
    warmup_prompt_tokens: int = 128
    """Warm-up prefills this much of the prompt, or all of it where it is shorter."""
    warmup_decode_tokens: int = 8
    repeats: int = 6
    memory_repeats: int = 2
    threads: int = field(default_factory=usable_cores)

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ShortstackError(
                    f"workload: {name} is {value!r}, it must be a whole number from {least} up."
                )

    @property
    def context_tokens(self) -> int:
        """What a session must hold: the prompt, the first token, every decoded one."""
        warmup = min(self.warmup_prompt_tokens, self.prompt_tokens) + self.warmup_decode_tokens
        return max(self.prompt_tokens + self.decode_tokens, warmup) + 1

    def to_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Workload:
        return cls(**data)


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
