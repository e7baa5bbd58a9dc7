"""Greedy search over cuts: remove what hurts least, look again, remove the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shortstack.errors import ShortstackError
from shortstack.prune.climb import Cut
from shortstack.prune.plan import PrunePlan

Evaluate = Callable[[list[Cut]], list[float]]
"""How bad the model is under each cut; lower is better, all in one unit."""


@dataclass(frozen=True)
class Search:
    """What a search removed, in order, and what it saw on the way.

    `path` holds (piece, score of the model without it and all before); `harm` each piece's
    latest known harm: how much the score rose when it alone was removed further.
    """

    path: tuple[tuple[Cut, float], ...]
    harm: Mapping[Cut, float]
    tried: int

    @property
    def cut(self) -> Cut:
        return frozenset().union(*(piece for piece, _ in self.path))


def greedy_search(
    pieces: Sequence[Cut],
    count: int,
    evaluate: Evaluate,
    *,
    start: float,
    screen: int = 0,
    hints: Mapping[Cut, float] | None = None,
    step: Callable[[int], None] = lambda done: None,
) -> Search:
    """Remove `count` of `pieces`, each time the one without which the model is best.

    `start` is the score of the whole model. With `screen` n > 0 each step tries only the n pieces
    whose latest known harm is lowest (in the beginning `hints`, in the same unit). Harm mostly
    grows as more is gone, so an old number is a lower bound, and a piece passed over rises to the
    top as the others' numbers are renewed: lazy greedy search (Minoux 1978) with a bounded width.
    Raises ShortstackError where no score is finite.
    """
    harm = dict.fromkeys(pieces, 0.0) | dict(hints or {})
    left, score, n_tried = list(pieces), start, 0
    path: list[tuple[Cut, float]] = []
    for done in range(count):
        gone: Cut = frozenset().union(*(piece for piece, _ in path))
        tried = sorted(left, key=harm.__getitem__)[
            : screen or None
        ]  # a stable sort: ties to the left
        scores = [_comparable(found) for found in evaluate([gone | piece for piece in tried])]
        harm |= {piece: found - score for piece, found in zip(tried, scores, strict=True)}
        n_tried += len(tried)
        score, at = min((s, left.index(piece)) for piece, s in zip(tried, scores, strict=True))
        if not math.isfinite(score):
            raise ShortstackError(
                f"without {done + 1} pieces every score is infinite or no number. "
                "Use dtype=float32, or other text."
            )
        path.append((left.pop(at), score))
        step(done + 1)
    return Search(tuple(path), harm, n_tried)


def check_screen(screen: int) -> None:
    """Raise ShortstackError for a number of candidates that makes no sense."""
    if screen < 0:
        raise ShortstackError(
            f"cannot try {screen} candidates a step. Use 1 or more, or 0 for every candidate."
        )


def _comparable(score: float) -> float:
    """A model that gives NaN is as bad as can be."""
    return math.inf if math.isnan(score) else score


def path_facts(search: Search, name: Callable[[Cut], Any]) -> list[dict[str, Any]]:
    """The path as JSON-able data."""
    return [{"drop": name(piece), "score": score} for piece, score in search.path]


def plan_of_layers(
    search: Search, n_layers: int, method: str, facts: Mapping[str, Any]
) -> PrunePlan:
    """The plan of a search whose pieces are layers, its path among the facts. Scores: the latest
    known harm of each layer; None if it has none."""
    harm = {min(piece)[0]: score for piece, score in search.harm.items() if math.isfinite(score)}
    return PrunePlan(
        n_layers,
        tuple(sorted({layer for layer, _ in search.cut})),
        method,
        tuple(harm.get(index) for index in range(n_layers)),
        {**facts, "path": path_facts(search, lambda piece: min(piece)[0])},
    )
