"""How far an artifact is from its checkpoint: arrays in, numbers out.

`log_probs` below are natural logarithms of next-token distributions, shape (positions, vocabulary).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def log_softmax(logits: Array) -> Array:
    """log softmax(x) = x - max(x) - log Σ exp(x - max(x)), along the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    return np.asarray(shifted - np.log(total), np.float32)


def kl_divergence(reference: Array, candidate: Array) -> NDArray[np.float64]:
    """KL(p‖q) = Σ p (log p - log q) at each position, in nats; p is the reference."""
    terms = np.exp(reference) * (reference - candidate)
    return np.asarray(terms.sum(axis=-1, dtype=np.float64))


def same_top(reference: Array, candidate: Array) -> NDArray[np.bool_]:
    """Whether both put the same token first, at each position."""
    return np.asarray(reference.argmax(axis=-1) == candidate.argmax(axis=-1))


def surprise(log_probs: Array, targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """-log p(target) at each position, in nats; the mean's exponential is the perplexity."""
    return -log_probs[np.arange(len(targets)), targets].astype(np.float64)


@dataclass
class Tally:
    """Sums over positions, so that no window has to stay in memory."""

    n: int = 0
    kl: float = 0.0
    max_kl: float = 0.0
    same: int = 0
    max_error: float = 0.0
    n_targets: int = 0
    surprise: float = 0.0

    def add(self, reference: Array, candidate: Array, targets: NDArray[np.int64]) -> None:
        """Count positions; `targets` are the tokens that follow the first of them.

        `max_error` is the largest |Δ log p| over tokens that the reference gives at least 1e-4:
        far down the tail a difference decides nothing.
        """
        kl = kl_divergence(reference, candidate)
        self.n += len(kl)
        self.kl += float(kl.sum())
        self.max_kl = _max(self.max_kl, float(kl.max(initial=0.0)))
        self.same += int(same_top(reference, candidate).sum())
        likely = reference > math.log(1e-4)
        error = float(np.abs(candidate - reference)[likely].max(initial=0.0))
        self.max_error = _max(self.max_error, error)
        self.n_targets += len(targets)
        self.surprise += float(surprise(candidate, targets).sum())

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.n + other.n,
            self.kl + other.kl,
            _max(self.max_kl, other.max_kl),
            self.same + other.same,
            _max(self.max_error, other.max_error),
            self.n_targets + other.n_targets,
            self.surprise + other.surprise,
        )

    @property
    def mean_kl(self) -> float:
        return self.kl / self.n

    @property
    def top1(self) -> float:
        return self.same / self.n

    @property
    def perplexity(self) -> float:
        """exp of the mean surprise; infinite where that overflows."""
        mean = self.surprise / self.n_targets
        return math.exp(mean) if mean < 700 else math.inf


def _max(left: float, right: float) -> float:
    """The larger one, NaN if either is: a NaN must not look like agreement."""
    return float(np.maximum(left, right))
