"""How large a model's activations get, and which formats still hold them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shortstack.errors import ShortstackError

FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class Peak:
    """The largest absolute value of one kind of activation: in which layer, at which module."""

    value: float
    layer: int
    module: str


@dataclass(frozen=True)
class ActivationRange:
    """Peaks over calibration tokens: of what linear layers read, and of everything written.

    `inputs` is what a runtime converts before a product with F16 weights; `anywhere` counts the
    residual stream and the linear layers' results, too.
    """

    inputs: Peak
    anywhere: Peak
    n_tokens: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ActivationRange:
        return cls(Peak(**data["inputs"]), Peak(**data["anywhere"]), int(data["n_tokens"]))


def fits_float16(peak: Peak) -> bool:
    return peak.value <= FLOAT16_MAX


def refuse_float16(peak: Peak, what: str, instead: str) -> None:
    """Raise ShortstackError if float16 would turn the peak into infinity."""
    if not fits_float16(peak):
        raise ShortstackError(
            f"{what}: {_words(peak)}, beyond the {FLOAT16_MAX:.0f} that float16 holds. {instead}"
        )


def notes(seen: ActivationRange) -> tuple[str, ...]:
    """One line on the range, with advice where float16 arithmetic would overflow."""
    words = f"largest activation on {seen.n_tokens} calibration tokens: {_words(seen.anywhere)}"
    if fits_float16(seen.anywhere):
        return (words,)
    return (
        f"{words}; beyond float16 ({FLOAT16_MAX:.0f}): use bfloat16 or float32 where a device "
        "computes in float16",
    )


def _words(peak: Peak) -> str:
    return f"{peak.value:.4g} in layer {peak.layer} ({peak.module})"
