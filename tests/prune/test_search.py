"""Greedy search on made-up harms: what is tried, and when."""

from __future__ import annotations

import math

import pytest

from shortstack.errors import ShortstackError
from shortstack.prune.climb import Cut, whole
from shortstack.prune.protect import pick
from shortstack.prune.search import Scout, Search, greedy_search

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


class Counted:
    """The same harms, and how many cuts were asked for."""

    def __init__(self) -> None:
        self.asked: list[Cut] = []

    def __call__(self, cuts: list[Cut]) -> list[float]:
        self.asked += cuts
        return evaluate(cuts)


def test_a_screened_search_finds_the_same_path_with_fewer_trials() -> None:
    plain = greedy_search(PIECES, 4, evaluate, start=0.0)
    screened = greedy_search(
        PIECES, 4, evaluate, start=0.0, screen=2, scout=Scout(evaluate, PIECES)
    )
    assert order(plain) == order(screened) == [1, 3, 5, 0]
    assert (plain.tried, screened.tried) == (6 + 5 + 4 + 3, 8)
    assert [score for _, score in plain.path] == [score for _, score in screened.path]
    assert screened.cut == frozenset().union(*(piece for piece, _ in screened.path))


def test_a_scout_looks_again_only_at_what_was_least_harmful() -> None:
    counted = Counted()
    scout = Scout(counted, PIECES)
    assert counted.asked == [frozenset(), *PIECES]
    assert scout.best(frozenset(), PIECES, 1) == [PIECES[1]]
    assert len(counted.asked) == 7  # it had seen each alone
    left = [piece for piece in PIECES if piece != PIECES[1]]
    assert scout.best(PIECES[1], left, 1) == [PIECES[3]]  # 2 lies beside 1: 5.5, not 1.5
    assert counted.asked[7:] == [PIECES[1] | PIECES[at] for at in (2, 3, 5, 0, 4)]
    assert scout.harm[PIECES[2]] == 5.5


def test_a_piece_that_got_worse_makes_room_for_one_that_was_passed_over() -> None:
    pieces = [whole(index) for index in range(12)]

    def steep(cuts: list[Cut]) -> list[float]:
        """Layers 0 to 4 hurt little alone, and by 10 more beside each other."""
        found = []
        for cut in cuts:
            gone = sorted({layer for layer, _ in cut})
            low = sum(layer < 5 for layer in gone)
            found.append(sum(1.0 + layer for layer in gone) + 10.0 * low * (low - 1))
        return found

    found = greedy_search(pieces, 3, steep, start=0.0, screen=1, scout=Scout(steep, pieces))
    # After 0 a scout sees 1 to 4 at 22 or more, and 5 at 6; 6 it had passed over till then.
    assert order(found) == [0, 5, 6]
    assert found.harm[whole(11)] == 12.0  # never looked at again


def test_a_scout_that_misses_is_corrected_by_all_of_the_text() -> None:
    def short(cuts: list[Cut]) -> list[float]:
        return [
            score - 0.8 * any(layer == 2 for layer, _ in cut)
            for cut, score in zip(cuts, evaluate(cuts), strict=True)
        ]

    scout = Scout(short, PIECES)
    assert scout.best(frozenset(), PIECES, 2) == [PIECES[2], PIECES[1]]
    assert order(greedy_search(PIECES, 1, evaluate, start=0.0, screen=2, scout=scout)) == [1]


def test_ties_go_to_the_left() -> None:
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
