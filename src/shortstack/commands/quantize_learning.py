"""The text that `shortstack quantize --learn-tokens` learns codes from."""

from __future__ import annotations

import functools
import math
from pathlib import Path

from shortstack.checkpoint import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.progress import Display
from shortstack.prune.heal.data import drawn, packed_windows
from shortstack.prune.quantize import LearningText, QuantizeSettings
from shortstack.text import Corpus
from shortstack.tokens import Encoder

BEGINNING_TOKENS = 8
"""Of a window of text: what the original model goes on from when it writes text itself."""

HELD_OUT_WINDOWS = 16


def beside(out: Path, what: str) -> Path:
    """A hidden place beside the output, for what a killed run goes on from."""
    target = out.resolve()
    return target.with_name(f".{target.name}.{what}")


def learning_text(
    checkpoint: Checkpoint,
    corpus: Corpus,
    settings: QuantizeSettings,
    length: int,
    self_generated_tokens: int,
    out: Path,
    key: str,
    display: Display,
) -> LearningText:
    """Windows of the calibration part, in an order that the seed draws, and what the model itself
    writes; held out are windows of the selection part. Raises ShortstackError for too little text.
    """
    encoder = Encoder(checkpoint)
    inner = length - len(encoder.prefix)
    cut = packed_windows(corpus.calibration, encoder.encode, inner)
    if not cut:
        raise ShortstackError(
            f"the text holds no {length} tokens. Give more text or ask for shorter windows."
        )
    windows = drawn([[*encoder.prefix, *window] for window in cut], settings.seed)
    held_out = encoder.windows(corpus.selection, length, HELD_OUT_WINDOWS)
    if self_generated_tokens:
        from shortstack.prune.heal.sample import kept_windows, sampled_windows

        make = functools.partial(
            sampled_windows,
            *(checkpoint, [window[:BEGINNING_TOKENS] for window in windows], length),
            math.ceil(self_generated_tokens / length),
            seed=settings.seed,
            device="cpu" if settings.device == "cpu" else "auto",
        )
        with display.step("Let the model write") as progress:
            make = functools.partial(make, progress=progress)
            windows += kept_windows(beside(out, "samples"), key, make, first=True)
    return LearningText(windows, held_out, beside(out, "learning"), key, display.note)
