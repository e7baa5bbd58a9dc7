"""Which checks are made and from which score a row leaves: what saves most time on validation rows.

Arrays in, numbers out.
"""

from __future__ import annotations

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
    made. For every threshold that is tried, the first checks are left out until the rest hold the
    limits; then checks are taken away one by one, that whose absence saves most time within them,
    as long as there is one. To hold the limits by leaving out any check that these rows do not
    like would be to fit these rows. With a cost of 0 all checks are made but those at which few
    leave. Raises ShortstackError where nothing saves time within the limits.
    """
    if not cost:
        return _by_layers(traced, limits)
    best: tuple[tuple[float, int, float], list[int]] | None = None
    tried = []
    for threshold in map(float, candidates(traced.scores)):
        tried.append(outcome(traced, threshold, cost))
        kept, saved = _eliminated(traced, threshold, limits, cost)
        key = (saved, -len(kept), threshold)
        if kept and saved > 0 and (best is None or key > best[0]):
            best = key, kept
    if best is None:
        saving = [one for one in tried if one.time_saved > 0]
        raise refusal(saving, len(traced.full), limits, cost)
    (_, _, threshold), kept = best
    return kept, outcome(columns(traced, kept), threshold, cost)


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


def _eliminated(
    traced: Traced, threshold: float, limits: Limits, cost: float
) -> tuple[list[int], float]:
    """(checks kept, share of time saved); none where not even the last check holds the limits."""
    kept = np.arange(len(traced.layers))
    beyond, saved = _without_each(traced, threshold, kept, limits, cost)
    while beyond[0] > 0:
        kept = kept[1:]
        if not len(kept):
            return [], 0.0
        beyond, saved = _without_each(traced, threshold, kept, limits, cost)
    while len(kept) > 1:
        held = np.where(beyond[1:] > 0, -np.inf, saved[1:])
        if held.max() < saved[0]:
            break
        kept = np.delete(kept, held.argmax())
        beyond, saved = _without_each(traced, threshold, kept, limits, cost)
    return kept.tolist(), float(saved[0])


def _without_each(
    traced: Traced, threshold: float, kept: NDArray[np.int64], limits: Limits, cost: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(how far beyond the limits, share of time saved) with the checks `kept` [0], and without the
    j-th of them [1 + j]."""
    rows = len(traced.scores)
    layers, made, right, changed = _totals(traced, traced.scores[:, kept] >= threshold, kept)
    loss = ((traced.full == traced.right).sum() - right) / rows
    saved = 1 - (layers + cost * made) / (rows * traced.n_layers)
    return limits.beyond(loss, changed / rows), saved


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
