"""The numbers of an evaluation: arrays in, numbers out. Nothing of ours is imported.

`nats` of a question is -log p of each choice, shape (choices,): the least is the model's answer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Z95 = 1.959963984540054
"""The normal quantile of a two-sided 95 % interval."""
DRAWS = 2000
"""Bootstrap resamples."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    estimate: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def chosen(nats: Sequence[float]) -> int:
    """The likeliest choice; the first of equals, as numpy's argmax has it."""
    return int(np.argmin(nats))


def chosen_by_length(nats: Sequence[float], lengths: Sequence[int]) -> int:
    """The choice that is likeliest for its length: lm-evaluation-harness's `acc_norm`.

    `lengths` are characters of each choice, without the space before it.
    """
    return int(np.argmin(np.asarray(nats) / np.asarray(lengths, np.float64)))


def wilson(n_right: int, n: int) -> Interval:
    """Share with its score interval (Wilson 1927), which stays within 0 and 1."""
    if n < 1:
        raise ValueError("a share of no rows")
    share, z2 = n_right / n, Z95 * Z95
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # exact ends: the rounding of the square root must not leave an interval without its estimate
    low = 0.0 if n_right == 0 else middle - half
    high = 1.0 if n_right == n else middle + half
    return Interval(share, low, high)


def chance(n_choices: Sequence[int]) -> float:
    """What guessing gets: the mean of 1 / (number of choices)."""
    return float(np.mean([1 / n for n in n_choices]))


def majority(answers: Sequence[int]) -> float:
    """What the most frequent answer gets, whatever is asked."""
    return float(np.bincount(np.asarray(answers)).max() / len(answers))


def macro_f1(
    answers: Sequence[int] | NDArray[np.int64], predictions: Sequence[int] | NDArray[np.int64]
) -> float:
    """Mean over classes of F1 = 2 tp / (2 tp + fp + fn); a class is one that either side names."""
    right, said = np.asarray(answers), np.asarray(predictions)
    scores = []
    for label in np.union1d(right, said):
        true_positives = np.sum((right == label) & (said == label))
        scores.append(2 * true_positives / (np.sum(right == label) + np.sum(said == label)))
    return float(np.mean(scores))


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float], n: int, *, seed: int = 0, draws: int = DRAWS
) -> Interval:
    """Percentile interval of `statistic`, which is given row indices, over resampled rows."""
    if n < 1:
        raise ValueError("a bootstrap of no rows")
    generator = np.random.default_rng(seed)
    found = [statistic(generator.integers(0, n, n)) for _ in range(draws)]
    low, high = np.quantile(found, (0.025, 0.975))
    return Interval(statistic(np.arange(n)), float(low), float(high))


def macro_f1_interval(
    answers: Sequence[int], predictions: Sequence[int], *, seed: int = 0
) -> Interval:
    """Macro-F1 with a bootstrap interval over rows."""
    right, said = np.asarray(answers), np.asarray(predictions)

    def of(rows: NDArray[np.int64]) -> float:
        return macro_f1(right[rows], said[rows])

    return bootstrap(of, len(right), seed=seed)


def ratio_of_sums(values: Sequence[float], counts: Sequence[int], *, seed: int = 0) -> Interval:
    """Σ values / Σ counts over windows, with a bootstrap interval over windows."""
    sums, sizes = np.asarray(values, np.float64), np.asarray(counts, np.float64)

    def of(rows: NDArray[np.int64]) -> float:
        return float(sums[rows].sum() / sizes[rows].sum())

    return bootstrap(of, len(sums), seed=seed)


def kl_divergence(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> Floats:
    """KL(p‖q) = Σ p (log p - log q) at each position, in nats; p is the reference.

    Both are natural logarithms of distributions, shape (positions, vocabulary).
    """
    terms = np.exp(reference) * (reference - candidate)
    return np.asarray(terms.sum(axis=-1, dtype=np.float64))


def perplexity(nats: Sequence[float], n_tokens: Sequence[int], *, seed: int = 0) -> Interval:
    """exp(Σ nats / Σ tokens) over windows, with a bootstrap interval over windows."""
    found = ratio_of_sums(nats, n_tokens, seed=seed)
    # exp grows with its argument: quantiles stay quantiles
    return Interval(*(_exp(value) for value in (found.estimate, found.low, found.high)))


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def stability_weights(option_nats: Sequence[Sequence[float]], *, exp: bool = False) -> Floats:
    """w = softmax over questions of the standard deviation over options of the original's PPL.

    LLM-Streamline (arXiv:2403.19135), the weights of its stability metric: a question counts
    where the original model tells the options apart. `option_nats` are nats a token of each
    option, one row a question: that PPL means them is inferred (docs/evaluation.md). `exp` takes
    the perplexity of the word instead, exp(nats a token), of which one question takes all the
    weight. Returns shape (questions,), sum 1.
    """
    rows = [np.asarray(nats, np.float64) for nats in option_nats]
    if exp:
        rows = [np.exp(np.minimum(row, 300)) for row in rows]  # beyond it a square overflows
    return softmax(np.array([row.std() for row in rows]))


def effective_n(weights: Floats) -> float:
    """How many rows weights stand for: 1 / Σ w² (Kish 1965)."""
    return float(1 / np.square(weights).sum())


def softmax(values: Floats) -> Floats:
    shifted = np.exp(values - values.max())
    return np.asarray(shifted / shifted.sum(), np.float64)


def stability(weights: Floats, original_right: Sequence[bool], right: Sequence[bool]) -> float:
    """Σ w_i · 1[both right, or both wrong] (LLM-Streamline, arXiv:2403.19135)."""
    same = np.asarray(original_right, bool) == np.asarray(right, bool)
    return float(weights[same].sum())


@dataclass(frozen=True)
class Difference:
    """Two models on the same rows: accuracy of the second less the first's, and its interval."""

    estimate: float
    low: float
    high: float
    only_first: int
    only_second: int
    p_value: float

    def to_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def paired_difference(
    first_right: Sequence[bool], second_right: Sequence[bool], *, seed: int = 0
) -> Difference:
    """Bootstrap interval over rows, and McNemar's exact test on the rows where the two differ."""
    first, second = np.asarray(first_right, bool), np.asarray(second_right, bool)
    gain = second.astype(np.float64) - first

    def of(rows: NDArray[np.int64]) -> float:
        return float(gain[rows].mean())

    found = bootstrap(of, len(gain), seed=seed)
    lost, won = int((first & ~second).sum()), int((~first & second).sum())
    return Difference(found.estimate, found.low, found.high, lost, won, mcnemar(lost, won))


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p: were each differing row a fair coin (McNemar 1947, binomial form)."""
    n, least = only_first + only_second, min(only_first, only_second)
    tail: float = sum(math.comb(n, k) for k in range(least + 1)) / 2**n
    return min(1.0, 2 * tail)
