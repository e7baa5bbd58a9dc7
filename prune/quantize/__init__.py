"""Round a checkpoint so that an entropy coder makes it small."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.checkpoint import Checkpoint
from shortstack.errors import SettingError, ShortstackError, require, unknown
from shortstack.progress import OnProgress, silent

METHODS = ("plain", "compensated")
MOST_BITS, MOST_RATE_WEIGHT = 8.0, 4.0


@dataclass(frozen=True)
class QuantizeSettings:
    """`bits` a weight of the whole file, everything counted; `method` is one of METHODS.

    `rate_weight`: see `compensate.compensated_codes`; `seed`: of the tokens that sensitivities are
    measured with. `tune_steps`: how long steps of rows, norms and biases then learn from the
    original model, see `tune.tune`; 0 for not at all. All three of `compensated` alone.
    """

    bits: float = 4.0
    method: str = "plain"
    rate_weight: float = 0.0
    seed: int = 0
    tune_steps: int = 12

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("method of quantizing", self.method, METHODS)
        if not 0.0 < self.bits <= MOST_BITS:
            told = f"must be above 0 and at most {MOST_BITS:g}, got {self.bits:g}."
            raise SettingError("bits", told)
        if not 0.0 <= self.rate_weight <= MOST_RATE_WEIGHT:
            raise SettingError("rate_weight", f"must be from 0 to {MOST_RATE_WEIGHT:g}.")
        if self.tune_steps < 0:
            raise SettingError("tune_steps", f"must be 0 or more, got {self.tune_steps}.")


def quantize(
    checkpoint: Checkpoint,
    out: Path,
    settings: QuantizeSettings,
    *,
    calibration: list[list[int]] | None = None,
    progress: OnProgress = silent,
) -> tuple[Checkpoint, dict[str, Any]]:
    """Write the quantized model into the existing empty folder `out`; return it and the facts.

    Its matrices are exactly codes times steps, stored in float32, and lie as such in the sidecar
    `row_codes.safetensors`; everything else is copied. `calibration`: windows of tokens, of one
    length, which `compensated` needs. Raises ShortstackError for settings
    that the model cannot meet, weights that are not finite and a full disk.
    """
    require(("torch", "transformers"), "prune", "quantizing a model")
    if settings.method == "compensated" and not calibration:
        raise ShortstackError("compensated rounding needs calibration text. Give it with --text.")
    if settings.tune_steps and settings.method == "compensated" and len(calibration or ()) < 2:
        raise ShortstackError("tuning needs two windows of text. Give more, or --tune-steps 0.")
    from shortstack.prune.quantize.drive import run

    return run(checkpoint, out, settings, calibration or [], progress)
