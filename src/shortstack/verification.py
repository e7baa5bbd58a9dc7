"""What a check of an artifact found, and the bounds it is held to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from shortstack.artifact import ExportSpec
from shortstack.errors import ShortstackError

EXACT = frozenset({"F32", "F16", "fp32", "fp16", "lossless"})
"""Precisions that must reproduce the checkpoint: no recipe can loosen their bounds."""

NOT_TYPES = ("builder", "coder", "effort")
"""Options that do not say how weights are stored."""

EXACT_KL = 1e-4
EXACT_TOP1 = 0.99


@dataclass(frozen=True)
class Bounds:
    """Limits; None where there is none. KL in nats a token, against the float32 checkpoint."""

    max_kl: float | None = None
    min_top1: float | None = None
    max_perplexity_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.max_kl is None and self.max_perplexity_ratio is None:
            raise ShortstackError(
                "a check needs a bound. Give max_perplexity_ratio (e.g. 1.5) or max_kl."
            )

    @classmethod
    def of(
        cls,
        spec: ExportSpec,
        *,
        max_perplexity_ratio: float | None,
        max_kl: float | None = None,
    ) -> Bounds:
        """Bounds of a spec: hard ones for exact precisions, the recipe's for quantized ones."""
        types = {value for name, value in spec.options if name not in NOT_TYPES}
        if {spec.precision, *types} <= EXACT:
            return cls(max_kl=EXACT_KL, min_top1=EXACT_TOP1)
        return cls(max_kl=max_kl, max_perplexity_ratio=max_perplexity_ratio)


@dataclass(frozen=True)
class Verification:
    """An artifact in its runtime against its checkpoint in float32 PyTorch, on the same tokens."""

    runtime: str
    runtime_version: str
    n_tokens: int
    n_windows: int
    prefill_tokens: int
    kl: float
    """Mean KL(reference‖artifact) in nats, over prefill and decoded positions."""
    kl_prefill: float
    kl_decode: float
    max_kl: float
    top1: float
    top1_prefill: float
    top1_decode: float
    max_error: float
    """Largest |Δ log p| over tokens of probability at least 1e-4."""
    perplexity: float
    reference_perplexity: float
    perplexity_decode: float
    """The same over decoded positions only: a broken cache must not hide behind the prefill."""
    reference_perplexity_decode: float
    tokenizer_equal: bool | None
    """Whether the runtime's own tokenizer gives the checkpoint's ids; None where it has none."""

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity / self.reference_perplexity

    @property
    def perplexity_ratio_decode(self) -> float:
        return self.perplexity_decode / self.reference_perplexity_decode

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Verification:
        return cls(**data)

    def failures(self, bounds: Bounds) -> tuple[str, ...]:
        """What is out of bounds, in words. A figure that is NaN is out of bounds."""
        found = []
        if self.tokenizer_equal is False:
            found.append(f"{self.runtime} cuts the text into other tokens than tokenizer.json")
        for name, value in (("prefill", self.kl_prefill), ("cached decoding", self.kl_decode)):
            if bounds.max_kl is not None and not value < bounds.max_kl:
                found.append(f"KL in {name} {value:.2g} is not below {bounds.max_kl:g}")
        for name, value in (("prefill", self.top1_prefill), ("cached decoding", self.top1_decode)):
            if bounds.min_top1 is not None and not value > bounds.min_top1:
                found.append(f"top-1 agreement in {name} {value:.1%} <= {bounds.min_top1:.0%}")
        for name, ratio in (
            ("perplexity", self.perplexity_ratio),
            ("perplexity in cached decoding", self.perplexity_ratio_decode),
        ):
            limit = bounds.max_perplexity_ratio
            if limit is not None and not ratio <= limit:
                found.append(f"{name} is {ratio:.3f} x the checkpoint's, the gate is {limit:g} x")
        return tuple(found)
