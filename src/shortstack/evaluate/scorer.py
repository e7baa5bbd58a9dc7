"""What an evaluation asks of a model, whichever runtime holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from shortstack.progress import OnProgress, silent

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Pair = tuple[list[int], list[int]]
"""Token ids of a context and of what follows it; neither is empty."""

Stop = Callable[[list[int]], bool]
"""Told the ids generated so far; True ends the generation."""


@dataclass(frozen=True)
class Scored:
    """A continuation under a model: `sum_nats` is -log p of its `n_tokens` tokens, in nats.

    `greedy`: every one of them is the likeliest where it stands.
    """

    sum_nats: float
    n_tokens: int
    greedy: bool


class Scorer(Protocol):
    """A model that can score and continue token ids. Contexts beyond `max_tokens` lose their
    left end, as lm-evaluation-harness does it."""

    @property
    def max_tokens(self) -> int: ...

    @property
    def info(self) -> dict[str, Any]:
        """Runtime, version, dtype or threads: what a reader of a result has to know."""
        ...

    def log_likelihoods(self, pairs: Sequence[Pair], progress: OnProgress = silent) -> list[Scored]:
        """Score each continuation after its context, in the order given."""
        ...

    def nats(self, windows: Sequence[list[int]], progress: OnProgress = silent) -> list[Scored]:
        """Score every token of each window but its first, in the order given."""
        ...

    def log_probs(self, window: list[int]) -> NDArray[np.float32]:
        """Natural log of the distribution after each token, shape (len(window), vocabulary)."""
        ...

    def generate(
        self,
        prompts: Sequence[list[int]],
        max_tokens: int,
        stop: Stop,
        progress: OnProgress = silent,
    ) -> list[list[int]]:
        """The likeliest token again and again, at most `max_tokens`, until `stop` says so."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


def check_pairs(pairs: Sequence[Pair], max_tokens: int) -> list[Pair]:
    """Cut each context at its left so that the pair fits, one token beyond what a model reads.

    Raises ValueError for an empty part and for a continuation longer than a model reads: callers
    check what users give.
    """
    fitting = []
    for context, continuation in pairs:
        if not context or not continuation:
            raise ValueError("a context or a continuation holds no token")
        room = max_tokens + 1 - len(continuation)
        if room < 1:
            raise ValueError(f"a continuation of {len(continuation)} tokens does not fit the model")
        fitting.append((context[-room:], continuation))
    return fitting
