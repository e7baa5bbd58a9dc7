"""Fewest bits that keep a perplexity: a search over `--bits` by what each costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from shortstack.checkpoint import Checkpoint

FIRST_BITS, LEAST_BITS, MOST_BITS = 4.5, 2.0, 8.0
TRIES = 4
CLOSE = 0.05
"""Tries whose bits would differ by less are not made."""

AIM = 0.95


@dataclass(frozen=True)
class Try:
    """One quantized model: bits a weight, and perplexity over the original's."""

    bits: float
    ratio: float


def fewest_bits(wanted_ratio: float, ratio_at: Callable[[float], float]) -> tuple[Try, ...]:
    """Models tried until `wanted_ratio`, above 1, is met closely, at most TRIES; in order.

    `ratio_at` quantizes to so many bits and gives the perplexity ratio. Noise of a step s costs
    s^2, and a bit less doubles s: log ratio falls by 4 a bit, or by what the last two tries say.
    The next try is where that law, through the last try, is AIM of the way to the wanted ratio,
    between those that are known to meet it and not.
    """
    tried: list[Try] = []
    bits = FIRST_BITS
    while True:
        tried.append(Try(bits, ratio_at(bits)))
        enough = min((t.bits for t in tried if t.ratio <= wanted_ratio), default=MOST_BITS)
        less = [t.bits for t in tried if t.ratio > wanted_ratio and t.bits < enough]
        few = max(less, default=LEAST_BITS)
        if len(tried) == TRIES or enough - few < 2 * CLOSE:
            return tuple(tried)
        aim = AIM * math.log(wanted_ratio)
        bits += math.log(_lost(tried[-1]) / aim, _fall(tried))
        bits = round(min(max(bits, few + CLOSE), enough - CLOSE), 3)
        if tried[-1].ratio <= wanted_ratio and enough - bits <= CLOSE + 1e-6:
            return tuple(tried)


def _lost(one: Try) -> float:
    return max(math.log(one.ratio), 1e-4)  # below the original's is noise


def _fall(tried: list[Try]) -> float:
    """By what log ratio falls a bit."""
    if len(tried) < 2:
        return 4.0
    one, two = tried[-2:]
    fall: float = (_lost(one) / _lost(two)) ** (1 / (two.bits - one.bits))
    return min(max(fall, 2.0), 8.0)


def mean_nats(checkpoint: Checkpoint, windows: list[list[int]]) -> float:
    """Negative log likelihood a predicted token, of windows of one length, in float32."""
    import torch

    from shortstack.prune.calibrate import LayerwiseModel, batches

    model, total = LayerwiseModel(checkpoint, "float32"), 0.0
    with torch.no_grad():
        for tokens in batches(windows):
            hidden = model.embed(tokens)
            for index in range(model.n_layers):
                hidden = model.layer(index, hidden)
            total += model.nats(hidden, tokens)
    return total / sum(len(window) - 1 for window in windows)


def best_of(tried: tuple[Try, ...], wanted_ratio: float) -> Try | None:
    """The one of fewest bits that meets the ratio; None where none does."""
    return min((t for t in tried if t.ratio <= wanted_ratio), key=lambda t: t.bits, default=None)
