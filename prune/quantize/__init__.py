"""Round a checkpoint so that an entropy coder makes it small."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.checkpoint import Checkpoint
from shortstack.errors import SettingError, require, unknown
from shortstack.progress import OnProgress, silent

METHODS = ("plain",)
MOST_BITS = 8.0


@dataclass(frozen=True)
class QuantizeSettings:
    """`bits` a weight of the whole file, everything counted; `method` is one of METHODS."""

    bits: float = 4.0
    method: str = "plain"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("method of quantizing", self.method, METHODS)
        if not 0.0 < self.bits <= MOST_BITS:
            raise SettingError("bits", f"must be above 0 and at most {MOST_BITS:g}, got {self.bits:g}.")


def quantize(
    checkpoint: Checkpoint,
    out: Path,
    settings: QuantizeSettings,
    *,
    progress: OnProgress = silent,
) -> tuple[Checkpoint, dict[str, Any]]:
    """Write the quantized model into the existing empty folder `out`; return it and the facts.

    Its matrices are exactly codes times steps, stored in float32, and lie as such in the sidecar
    `row_codes.safetensors`; everything else is copied. Raises ShortstackError for settings
    that the model cannot meet, weights that are not finite and a full disk.
    """
    require(("torch", "transformers"), "prune", "quantizing a model")
    from shortstack.prune.quantize.drive import run

    return run(checkpoint, out, settings, progress)
