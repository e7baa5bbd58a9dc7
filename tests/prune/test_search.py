"""Greedy search on made-up harms: what is tried, and when."""

from __future__ import annotations

import math

import pytest

from shortstack.errors import ShortstackError
from shortstack.prune.climb import Cut, whole
from shortstack.prune.protect import pick
from shortstack.prune.search import Search, greedy_search

PIECES = [whole(index) for index in range(6)]
HARM = (5.0, 1.0, 1.5, 2.0, 9.0, 3.0)


def evaluate(cuts: list[Cut]) -> list[float]:
    """Each layer has its harm; neighbours that go together hurt by 4 more."""
    scores = []
    for cut in cuts:
        gone = {layer for layer, _ in cut}
        scores.append(sum(HARM[layer] + 4 * (layer + 1 in gone) for layer in gone))
    return scores


def order(found: Search) -> list[int]:
    return [min(piece)[0] for piece, _ in found.path]


def test_a_screened_search_finds_the_same_path_with_fewer_trials() -> None:
    plain = greedy_search(PIECES, 4, evaluate, start=0.0)
    hints = dict(zip(PIECES, HARM, strict=True))
    screened = greedy_search(PIECES, 4, evaluate, start=0.0, screen=2, hints=hints)
    assert order(plain) == order(screened) == [1, 3, 5, 0]
    assert (plain.tried, screened.tried) == (6 + 5 + 4 + 3, 8)
    assert [score for _, score in plain.path] == [score for _, score in screened.path]
    assert screened.cut == frozenset().union(*(piece for piece, _ in screened.path))


def test_a_piece_that_got_worse_makes_room_for_one_that_was_passed_over() -> None:
    hints = dict(zip(PIECES, HARM, strict=True))
    found = greedy_search(PIECES, 3, evaluate, start=0.0, screen=2, hints=hints)
    assert order(found) == [1, 3, 5]  # 2 is tried beside 3, and costs 5.5
    assert found.harm[whole(4)] == 9.0  # never tried: still the hint
    assert found.harm[whole(2)] == 5.5


def test_without_hints_ties_go_to_the_left() -> None:
    found = greedy_search(PIECES, 1, lambda cuts: [1.0] * len(cuts), start=0.0)
    assert order(found) == [0]


def test_a_cut_that_gives_no_number_is_never_chosen() -> None:
    def broken(cuts: list[Cut]) -> list[float]:
        return [math.nan if any(layer == 0 for layer, _ in cut) else 2.0 for cut in cuts]

    assert order(greedy_search(PIECES, 1, broken, start=0.0)) == [1]
    with pytest.raises(ShortstackError, match="every score is infinite or no number"):
        greedy_search(PIECES, 6, broken, start=0.0)


def test_scores_that_are_no_numbers_have_no_lowest() -> None:
    with pytest.raises(ShortstackError, match="score of layer 2 is no number"):
        pick((None, 1.0, math.nan, 2.0), (1, 2, 3), 1)
