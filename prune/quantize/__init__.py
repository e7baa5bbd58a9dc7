"""Round a checkpoint so that an entropy coder makes it small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.checkpoint import Checkpoint
from shortstack.errors import SettingError, ShortstackError, require, unknown
from shortstack.progress import OnProgress, silent

METHODS = ("plain", "compensated")
MOST_BITS, MOST_RATE_WEIGHT = 8.0, 4.0
MOST_LEARNING_RATE = 0.5
"""In steps a batch: beyond it a code is another one after each batch."""


@dataclass(frozen=True)
class QuantizeSettings:
    """`bits` a weight of the whole file, everything counted; `method` is one of METHODS.

    `rate_weight`: see `compensate.compensated_codes`; `seed`: of the tokens that sensitivities are
    measured with. `tune_steps`: how long steps of rows, norms and biases then learn from the
    original model, see `tune.tune`; 0 for not at all. All three of `compensated` alone.

    `learn_tokens`: on how much text codes learn, too, instead of tuning, see `learn.Learner`; 0
    for not at all. In batches of `batch_tokens`, at `learning_rate` steps a batch. `device`: auto
    (a card where there is one), cpu or cuda:N, of that and of everything that `compensated` runs.
    """

    bits: float = 4.0
    method: str = "plain"
    rate_weight: float = 0.0
    seed: int = 0
    tune_steps: int = 12
    learn_tokens: int = 0
    learning_rate: float = 0.003
    batch_tokens: int = 8192
    device: str = "auto"

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
        if self.learn_tokens < 0:
            raise SettingError("learn_tokens", f"must be 0 or more, got {self.learn_tokens}.")
        if not 0.0 < self.learning_rate <= MOST_LEARNING_RATE:
            told = (
                f"must be above 0 and at most {MOST_LEARNING_RATE:g}, got {self.learning_rate:g}."
            )
            raise SettingError("learning_rate", told)
        if self.batch_tokens < 1:
            raise SettingError("batch_tokens", f"must be 1 or more, got {self.batch_tokens}.")

    @property
    def tunes(self) -> bool:
        """Whether steps, norms and biases learn alone, codes as they are."""
        return self.method == "compensated" and self.tune_steps > 0 and not self.learn_tokens


@dataclass(frozen=True)
class LearningText:
    """`windows` of tokens, all of one length, to learn codes from, and those to choose the best
    state on: other text, which the calibration has not seen either. `state`: a folder for what a
    killed run goes on from, removed at the end; `key` tells its run from others. `note` is told how
    the run goes."""

    windows: list[list[int]]
    held_out: list[list[int]]
    state: Path | None = None
    key: str = ""
    note: Callable[[str], None] = lambda text: None


def quantize(
    checkpoint: Checkpoint,
    out: Path,
    settings: QuantizeSettings,
    *,
    calibration: list[list[int]] | None = None,
    learning: LearningText | None = None,
    progress: OnProgress = silent,
) -> tuple[Checkpoint, dict[str, Any]]:
    """Write the quantized model into the existing empty folder `out`; return it and the facts.

    Its matrices are exactly codes times steps, stored in float32, and lie as such in the sidecar
    `row_codes.safetensors`; everything else is copied. `calibration`: windows of tokens, of one
    length, which `compensated` needs; `learning`: text that codes learn from, where settings want
    it. Raises ShortstackError for settings that the model cannot meet, weights that are not finite
    and a full disk.
    """
    require(("torch", "transformers"), "prune", "quantizing a model")
    if settings.method == "compensated" and not calibration:
        raise ShortstackError("compensated rounding needs calibration text. Give it with --text.")
    if settings.tunes and len(calibration or ()) < 2:
        raise ShortstackError("tuning needs two windows of text. Give more, or --tune-steps 0.")
    if settings.learn_tokens and not (learning and learning.windows and learning.held_out):
        raise ShortstackError("learning codes needs text, and other to choose on. Give --text.")
    from shortstack.prune.quantize.drive import run

    return run(checkpoint, out, settings, calibration or [], learning, progress)
