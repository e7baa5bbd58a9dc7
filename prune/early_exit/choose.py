"""Which checks are made and from which score a row leaves: what saves most time on validation rows.

Arrays in, numbers out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from shortstack.prune.early_exit.calibrate import (
    Limits,
    Outcome,
    Traced,
    calibrated,
    candidates,
    outcome,
    refusal,
)

LEAST_LEAVING = 0.02
"""Where a check costs nothing, one at which a smaller share of rows leaves is dropped."""


def choose(traced: Traced, limits: Limits, cost: float) -> tuple[list[int], Outcome]:
    """(numbers of the checks that are made, the threshold and what it does on these rows).

    `cost`: of a check, in layers. Of it the time saved is made: layers not run - cost x checks
    made. For every threshold that is tried checks are taken away one by one, that which leaves
    most time saved within the limits, or is least beyond them, until one is left; the best of all
    sets on the way is taken. With a cost of 0 that would only choose what these rows happen to
    like: all checks are made but those at which few leave. Raises ShortstackError where nothing
    saves time within the limits.
    """
    if not cost:
        return _by_layers(traced, limits)
    best: tuple[tuple[float, float, int, float], NDArray[np.int64]] | None = None
    for threshold in candidates(traced.scores):
        for kept, beyond, saved in _path(traced, float(threshold), limits, cost):
            key = (-beyond, saved, -len(kept), float(threshold))
            if saved > 0 and (best is None or key > best[0]):
                best = key, kept
    if best is None:
        raise refusal([], len(traced.full), limits, cost)
    (_, _, _, threshold), kept = best
    found = outcome(columns(traced, kept.tolist()), threshold, cost)
    if limits.beyond(found.loss, found.changed) > 0:
        raise refusal([found], len(traced.full), limits, cost)
    return kept.tolist(), found


def _by_layers(traced: Traced, limits: Limits) -> tuple[list[int], Outcome]:
    found = calibrated(traced, limits)
    kept = _used(traced, found.threshold)
    if not 0 < len(kept) < len(traced.layers):
        return list(range(len(traced.layers))), found
    return kept, calibrated(columns(traced, kept), limits)


def _used(traced: Traced, threshold: float) -> list[int]:
    """Checks at which enough rows leave."""
    leaves = traced.scores >= threshold
    first = leaves.argmax(1)[leaves.any(1)]
    shares = np.bincount(first, minlength=len(traced.layers)) / len(leaves)
    return [int(check) for check in np.flatnonzero(shares >= LEAST_LEAVING)]


def columns(traced: Traced, kept: list[int]) -> Traced:
    """What would happen were only these checks made."""
    return replace(
        traced,
        scores=traced.scores[:, kept],
        chosen=traced.chosen[:, kept],
        layers=[traced.layers[at] for at in kept],
    )


def _path(
    traced: Traced, threshold: float, limits: Limits, cost: float
) -> Iterator[tuple[NDArray[np.int64], float, float]]:
    """(checks kept, how far beyond the limits, share of time saved), with one check less each."""
    leaves = traced.scores >= threshold
    kept = np.arange(len(traced.layers))
    whole = len(leaves) * traced.n_layers
    full_right = (traced.full == traced.right).sum()
    while True:
        totals = _totals(traced, leaves[:, kept], kept)  # [0]: as it is; [1 + j]: without kept[j]
        layers, made, right, changed = totals
        beyond = limits.beyond((full_right - right) / len(leaves), changed / len(leaves))
        saved = 1 - (layers + cost * made) / whole
        yield kept, float(beyond[0]), float(saved[0])
        if len(kept) == 1:
            return
        kept = np.delete(kept, np.lexsort((saved[1:], -beyond[1:]))[-1])


def _totals(
    traced: Traced, leaves: NDArray[np.bool_], kept: NDArray[np.int64]
) -> tuple[NDArray[np.float64], ...]:
    """Sums over rows of layers run, checks made, right answers and changed ones, each as it is and
    without each of the checks. `leaves` (rows, kept): whether a row's score would do there."""
    rows, count = np.arange(len(leaves)), len(kept)
    first = np.where(leaves.any(1), leaves.argmax(1), count)
    later = leaves & (np.arange(count) > first[:, None])
    second = np.where(later.any(1), later.argmax(1), count)
    depths = np.append(np.asarray(traced.layers)[kept], traced.n_layers)
    said = np.column_stack([traced.chosen[:, kept], traced.full])
    now = (
        depths[first],
        np.minimum(first + 1, count),
        said[rows, first] == traced.right,
        said[rows, first] != traced.full,
    )
    then = (  # of a row whose check is not made: it goes on to the next one where it may leave
        depths[second],
        np.minimum(second, count - 1),
        said[rows, second] == traced.right,
        said[rows, second] != traced.full,
    )
    sums = []
    for have, get in zip(now, then, strict=True):
        have, get = have.astype(np.float64), get.astype(np.float64)
        change = np.bincount(first, weights=get - have, minlength=count + 1)[:count]
        sums.append(np.append(have.sum(), have.sum() + change))
    passing = len(first) - np.cumsum(np.bincount(first, minlength=count + 1))[:count]
    sums[1][1:] -= passing  # one check less for those who leave behind it
    return tuple(sums)
