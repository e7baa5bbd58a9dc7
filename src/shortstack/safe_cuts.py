"""The nearest cuts that a runtime with a fixed rhythm of layers can express."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

SUGGESTIONS = 3


class _Cut(NamedTuple):
    """A choice for the layers so far, ordered by what makes it good."""

    differences: int
    """Layers treated otherwise than wanted."""
    runs: int
    distance: int
    """How far the other layers dropped are from the wanted ones, summed."""
    drop: tuple[int, ...]


def nearest(
    kinds: Sequence[bool], wanted_drop: Sequence[int], expected: Callable[[int], bool]
) -> list[tuple[int, ...]]:
    """Up to three cuts after which every kept layer has the kind of its new place.

    `kinds[i]` is the kind of layer i now, `expected(j)` the kind a runtime assumes at place j.
    Best first: cuts of as many layers as wanted, then those that treat the fewest layers otherwise,
    then those in fewer runs, then those nearest by. A cut drops at least one layer and keeps at
    least one; the list is empty if there is none, and holds `wanted_drop` alone if that is safe.

    Dynamic programme over layers. State: how many are kept, and whether the last one was dropped;
    each state holds its best few choices, so time is O(layers^2).
    """
    wanted = frozenset(wanted_drop)
    if is_safe(kinds, tuple(sorted(wanted)), expected):
        return [tuple(sorted(wanted))]
    states: dict[tuple[int, bool], list[_Cut]] = {(0, False): [_Cut(0, 0, 0, ())]}
    for layer, kind in enumerate(kinds):
        following: dict[tuple[int, bool], list[_Cut]] = {}
        for (kept, was_dropped), cuts in states.items():
            for cut in cuts:
                dropped = _Cut(
                    cut.differences + (layer not in wanted),
                    cut.runs + (not was_dropped),
                    cut.distance + min((abs(layer - other) for other in wanted), default=0),
                    (*cut.drop, layer),
                )
                following.setdefault((kept, True), []).append(dropped)
                if kind == expected(kept):
                    stays = cut._replace(differences=cut.differences + (layer in wanted))
                    following.setdefault((kept + 1, False), []).append(stays)
        states = {state: sorted(cuts)[:SUGGESTIONS] for state, cuts in following.items()}
    found = [cut for (kept, _), cuts in states.items() if kept for cut in cuts if cut.drop]
    found.sort(key=lambda cut: (len(cut.drop) != len(wanted), cut))
    return [cut.drop for cut in found[:SUGGESTIONS]]


def is_safe(kinds: Sequence[bool], drop: Sequence[int], expected: Callable[[int], bool]) -> bool:
    """Whether every kept layer has the kind of its new place, and something is kept."""
    gone = frozenset(drop)
    kept = [kind for layer, kind in enumerate(kinds) if layer not in gone]
    return bool(kept) and all(kind == expected(place) for place, kind in enumerate(kept))


def spell(drop: Sequence[int]) -> str:
    """Layer numbers as --drop takes them: 4-7,9."""
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in _runs(sorted(drop)))


def _runs(layers: Sequence[int]) -> Iterator[tuple[int, int]]:
    if not layers:
        return
    start = layers[0]
    for here, there in pairwise(layers):
        if there != here + 1:
            yield start, here
            start = there
    yield start, layers[-1]
