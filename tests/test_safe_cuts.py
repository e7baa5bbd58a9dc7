"""The nearest safe cuts, against all cuts tried one by one."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from shortstack.safe_cuts import is_safe, nearest, spell


def every_fourth(layer: int) -> bool:
    return layer % 4 != 3


def test_a_cut_out_of_step_is_answered_with_whole_periods_and_a_cut_of_the_same_size() -> None:
    kinds = [every_fourth(layer) for layer in range(12)]
    cuts = nearest(kinds, (5,), every_fourth)
    assert cuts[0] == (11,)  # the only safe cut of one layer
    assert (4, 5, 6, 7) in cuts


def test_a_safe_cut_is_its_own_nearest() -> None:
    kinds = [every_fourth(layer) for layer in range(12)]
    assert nearest(kinds, (4, 5, 6, 7), every_fourth) == [(4, 5, 6, 7)]


def test_no_cut_is_suggested_where_none_is_safe() -> None:
    assert nearest([True, True, True], (1,), lambda place: False) == []


@pytest.mark.parametrize("seed", range(12))
def test_the_search_finds_what_trying_all_cuts_finds(seed: int) -> None:
    draw = random.Random(seed)
    n_layers = draw.randint(2, 11)
    kinds = [draw.random() < 0.6 for _ in range(n_layers)]
    period = draw.randint(1, 5)
    wanted = frozenset(draw.sample(range(n_layers), draw.randint(1, n_layers - 1)))

    def expected(place: int) -> bool:
        return place % period != period - 1

    def rank(drop: tuple[int, ...]) -> tuple[bool, int]:
        return len(drop) != len(wanted), len(wanted ^ set(drop))

    cuts = [
        drop
        for size in range(1, n_layers)
        for drop in itertools.combinations(range(n_layers), size)
        if is_safe(kinds, drop, expected)
    ]
    found = nearest(kinds, sorted(wanted), expected)
    if tuple(sorted(wanted)) in cuts:
        assert found == [tuple(sorted(wanted))]
    else:
        assert [rank(drop) for drop in found] == sorted(map(rank, cuts))[:3]
        assert set(found) <= set(cuts)


def test_a_hundred_and_twenty_eight_layers_take_no_noticeable_time() -> None:
    kinds = [every_fourth(layer) for layer in range(128)]
    start = time.process_time()
    assert nearest(kinds, tuple(range(30, 53)), every_fourth)
    assert time.process_time() - start < 5


def test_layers_are_spelled_as_the_option_takes_them() -> None:
    assert spell((4, 5, 6, 7, 9, 11, 12)) == "4-7,9,11-12"
    assert spell(()) == ""
