"""Thresholds from validation rows: arrays in, numbers out. Nothing of ours but errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shortstack.errors import ShortstackError

CANDIDATES = 400
"""Thresholds that are tried, at most."""


@dataclass(frozen=True)
class Traced:
    """What would happen at every check, for each row: nothing has to be run again.

    `scores` and `chosen` (rows, checks), `full` and `right` (rows,), `layers` (checks,).
    """

    scores: NDArray[np.float32]
    chosen: NDArray[np.int64]
    full: NDArray[np.int64]
    right: NDArray[np.int64]
    layers: Sequence[int]
    n_layers: int


@dataclass(frozen=True)
class Outcome:
    """A threshold on rows: accuracy lost against the whole model (below 0: won), share of layers
    saved, share of rows whose answer is another."""

    threshold: float
    loss: float
    saved: float
    changed: float

    def to_dict(self) -> dict[str, float]:
        return dict(vars(self))


def outcome(traced: Traced, threshold: float) -> Outcome:
    """Every row leaves at the first check whose score is at least the threshold."""
    leaves = traced.scores >= threshold
    any_leaves, first = leaves.any(1), leaves.argmax(1)
    depths = np.asarray(traced.layers)[first]
    n_run = np.where(any_leaves, depths, traced.n_layers)
    rows = np.arange(len(first))
    said = np.where(any_leaves, traced.chosen[rows, first], traced.full)
    loss = (traced.full == traced.right).mean() - (said == traced.right).mean()
    return Outcome(
        threshold,
        float(loss),
        float(1 - n_run.mean() / traced.n_layers),
        float((said != traced.full).mean()),
    )


def calibrated(traced: Traced, max_loss: float, max_changed: float | None = None) -> Outcome:
    """The threshold that saves most layers and loses at most `max_loss` of accuracy on these rows.

    `max_changed`: the most rows whose answer may be another than the whole model's, which a loss
    hides where as many become right as wrong. Raises ShortstackError, with the best that is
    possible, where no threshold that saves anything holds both.
    """
    tried = [outcome(traced, float(value)) for value in _candidates(traced.scores)]
    saving = [one for one in tried if one.saved > 0]
    allowed = 1.0 if max_changed is None else max_changed
    held = [one for one in saving if one.loss <= max_loss + 1e-9 and one.changed <= allowed + 1e-9]
    if held:
        return max(held, key=lambda one: (one.saved, one.threshold))
    if not saving:
        raise ShortstackError("no threshold lets any row leave. Check after more layers.")
    best = min(saving, key=lambda one: (max(one.loss - max_loss, 0), one.changed, -one.saved))
    raise ShortstackError(
        f"no threshold saves layers and holds --max-accuracy-loss {max_loss:g}"
        f"{'' if max_changed is None else f' and --max-changed {max_changed:g}'}: the best of "
        f"{len(traced.full)} rows loses {best.loss:.4f}, changes {best.changed:.4f} and saves "
        f"{best.saved:.1%} of the layers. Allow that much, or give more rows."
    )


def _candidates(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Quantiles of the rows' scores, thinly spaced where it matters: near the highest."""
    finite = np.unique(scores)
    if len(finite) <= CANDIDATES:
        return finite.astype(np.float64)
    at = 1 - np.linspace(0, 1, CANDIDATES) ** 2
    # "higher": a score that occurs, so that no row lies between it and what is written
    return np.unique(np.quantile(finite, at, method="higher")).astype(np.float64)


def depth_rule(traced: Traced, max_loss: float, max_changed: float | None = None) -> Outcome:
    """The rule without scores: all rows leave at the first check that holds the loss.

    Returns its outcome with the number of layers as the threshold; that of no exit where none
    holds it.
    """
    full = (traced.full == traced.right).mean()
    allowed = 1.0 if max_changed is None else max_changed
    for check, n_run in enumerate(traced.layers):
        said = traced.chosen[:, check]
        loss = float(full - (said == traced.right).mean())
        changed = float((said != traced.full).mean())
        if loss <= max_loss + 1e-9 and changed <= allowed + 1e-9:
            return Outcome(float(n_run), loss, 1 - n_run / traced.n_layers, changed)
    return Outcome(float(traced.n_layers), 0.0, 0.0, 0.0)
