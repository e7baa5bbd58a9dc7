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


LOOKED_AT = 5
"""Candidates that a scout looks at for each one that it names."""


class Scout:
    """Looks at many candidates on less text, and names the few that are worth all of it.

    Harm mostly grows as more is gone, so an old number is a lower bound, and a piece passed over
    rises to the top as the others' numbers are renewed: lazy greedy search (Minoux 1978) with a
    bounded width.
    """

    def __init__(self, evaluate: Evaluate, pieces: Sequence[Cut]) -> None:
        start, *scores = map(_comparable, evaluate([frozenset(), *pieces]))
        self._evaluate = evaluate
        self._score: dict[Cut, float] = {frozenset(): start}
        self._score |= dict(zip(pieces, scores, strict=True))
        self.harm = {piece: score - start for piece, score in zip(pieces, scores, strict=True)}
        """How much each piece raised the score when it was last looked at."""

    def best(self, gone: Cut, left: Sequence[Cut], count: int) -> list[Cut]:
        """The `count` pieces of `left` that hurt least when `gone` is gone already; looks again
        only at LOOKED_AT times as many, those least harmful when last looked at."""
        looked = sorted(left, key=self.harm.__getitem__)[: LOOKED_AT * count]
        unseen = [piece for piece in looked if gone | piece not in self._score]
        if unseen:
            found = map(_comparable, self._evaluate([gone | piece for piece in unseen]))
            self._score |= {gone | piece: s for piece, s in zip(unseen, found, strict=True)}
        for piece in looked:
            self.harm[piece] = self._score[gone | piece] - self._score[gone]
        return sorted(looked, key=self.harm.__getitem__)[:count]  # stable: ties to the left


def greedy_search(
    pieces: Sequence[Cut],
    count: int,
    evaluate: Evaluate,
    *,
    start: float,
    screen: int = 0,
    scout: Scout | None = None,
    step: Callable[[int], None] = lambda done: None,
) -> Search:
    """Remove `count` of `pieces`, each time the one without which the model is best.

    `start` is the score of the whole model. With `screen` n > 0 each step tries only the n pieces
    that the `scout` names. Raises ShortstackError where no score is finite.
    """
    harm = dict.fromkeys(pieces, 0.0)
    left, score, n_tried = list(pieces), start, 0
    path: list[tuple[Cut, float]] = []
    for done in range(count):
        gone: Cut = frozenset().union(*(piece for piece, _ in path))
        tried = scout.best(gone, left, screen) if screen and scout else list(left)
        scores = [_comparable(found) for found in evaluate([gone | piece for piece in tried])]
        known = scout.harm if scout else {}
        harm |= {piece: known[piece] for piece in left if piece in known}
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
