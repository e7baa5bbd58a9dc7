"""The windows of text that a checkpoint is calibrated and checked on, cut to fit the model."""

from __future__ import annotations

import math

from shortstack.checkpoint import Checkpoint
from shortstack.families import context_tokens, layer_windows
from shortstack.recipe import CalibrationRecipe, VerifyRecipe
from shortstack.text import Corpus
from shortstack.tokens import Encoder

MARGIN = 16
"""Tokens that a check's prompt goes beyond the longest sliding window."""


def fit_checks(checks: VerifyRecipe, checkpoint: Checkpoint, context: int | None) -> VerifyRecipe:
    """Lengthen a check's windows beyond the model's sliding windows, in as few as hold its tokens.

    `context` is how many tokens the artifact agrees on: where it ends at the sliding window there
    is nothing beyond. Without this a wrong window would pass every check with a shorter prompt.
    """
    sizes = layer_windows(checkpoint.family, checkpoint.text)
    longest = max((size for size in sizes if size is not None), default=0)
    if not longest or (context is not None and context <= longest):
        return checks
    length = max(checks.window_tokens, longest + MARGIN + checks.decode_tokens)
    if context is not None:
        length = min(length, context)
    count = math.ceil(checks.windows * checks.window_tokens / length)
    decode = min(checks.decode_tokens, max(1, length - longest - 1))
    return VerifyRecipe(windows=count, window_tokens=length, decode_tokens=decode)


def unseen_windows(checkpoint: Checkpoint, corpus: Corpus, checks: VerifyRecipe) -> list[list[int]]:
    """Windows of text that no choice was made on."""
    return Encoder(checkpoint).windows(corpus.test, checks.window_tokens, checks.windows)


def calibration_windows(
    checkpoint: Checkpoint, corpus: Corpus, choice: CalibrationRecipe
) -> list[list[int]]:
    """Windows of calibration text for an importance matrix and the range of activations."""
    context = context_tokens(checkpoint.config, windowed=True)
    length = min(choice.window_tokens, context or choice.window_tokens)
    return Encoder(checkpoint).windows(corpus.calibration, length, choice.windows)
