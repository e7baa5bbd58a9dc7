"""Thresholds from validation rows: arrays in, numbers out. Nothing of ours but errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortstack.errors import ShortstackError

CANDIDATES = 400
"""Thresholds that are tried, at most."""
ROUNDING = 1e-9


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
    saved, share of rows whose answer is another, checks made for a row, share of the layers' time
    saved with the checks' taken off."""

    threshold: float
    loss: float
    saved: float
    changed: float
    checks: float
    time_saved: float

    def to_dict(self) -> dict[str, float]:
        return dict(vars(self))


@dataclass(frozen=True)
class Limits:
    """`changed`: the most rows whose answer may be another than the whole model's, which a loss
    hides where as many become right as wrong."""

    loss: float
    changed: float | None = None

    def beyond(self, loss: Any, changed: Any) -> Any:
        """By how much, of numbers or arrays; 0 where they hold."""
        allowed = 1.0 if self.changed is None else self.changed
        over = np.maximum(loss - self.loss - ROUNDING, 0)
        return over + np.maximum(changed - allowed - ROUNDING, 0)


def outcome(traced: Traced, threshold: float, cost: float = 0.0) -> Outcome:
    """Every row leaves at the first check whose score is at least the threshold. `cost`: of a
    check, in layers."""
    leaves = traced.scores >= threshold
    any_leaves, first = leaves.any(1), leaves.argmax(1)
    depths = np.asarray(traced.layers)[first]
    n_run = np.where(any_leaves, depths, traced.n_layers)
    rows = np.arange(len(first))
    said = np.where(any_leaves, traced.chosen[rows, first], traced.full)
    loss = (traced.full == traced.right).mean() - (said == traced.right).mean()
    made = np.where(any_leaves, first + 1, len(traced.layers)).mean()
    return Outcome(
        threshold,
        float(loss),
        float(1 - n_run.mean() / traced.n_layers),
        float((said != traced.full).mean()),
        float(made),
        float(1 - (n_run.mean() + cost * made) / traced.n_layers),
    )


def calibrated(traced: Traced, limits: Limits) -> Outcome:
    """The threshold that saves most layers within the limits on these rows.

    Raises ShortstackError, with the best that is possible, where no threshold that saves anything
    holds them.
    """
    tried = [outcome(traced, float(value)) for value in candidates(traced.scores)]
    saving = [one for one in tried if one.saved > 0]
    held = [one for one in saving if not limits.beyond(one.loss, one.changed)]
    if held:
        return max(held, key=lambda one: (one.saved, one.threshold))
    raise refusal(saving, len(traced.full), limits, 0.0)


def refusal(saving: Sequence[Outcome], n_rows: int, limits: Limits, cost: float) -> ShortstackError:
    """Of what would save time, none holds the limits."""
    if not saving and cost:
        return ShortstackError(
            f"no threshold saves time where a check takes {cost:g} of a layer's. Check less often "
            "(--every), choose a --check that takes less, or say what it takes: --check-cost."
        )
    if not saving:
        return ShortstackError("no threshold lets any row leave. Check after more layers.")
    best = min(saving, key=lambda one: (max(one.loss - limits.loss, 0), one.changed, -one.saved))
    also = "" if limits.changed is None else f" and --max-changed {limits.changed:g}"
    return ShortstackError(
        f"no threshold saves {'time' if cost else 'layers'} and holds --max-accuracy-loss "
        f"{limits.loss:g}{also}: the best of {n_rows} rows loses {best.loss:.4f}, changes "
        f"{best.changed:.4f} and saves {best.saved:.1%} of the layers. Allow that much, or give "
        "more rows."
    )


def candidates(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Quantiles of the rows' scores, thinly spaced where it matters: near the highest."""
    finite = np.unique(scores)
    if len(finite) <= CANDIDATES:
        return finite.astype(np.float64)
    at = 1 - np.linspace(0, 1, CANDIDATES) ** 2
    # "higher": a score that occurs, so that no row lies between it and what is written
    return np.unique(np.quantile(finite, at, method="higher")).astype(np.float64)


def depth_rule(traced: Traced, limits: Limits, cost: float = 0.0) -> Outcome:
    """The rule without scores: all rows leave at the first check that holds the limits.

    Returns its outcome with the number of layers as the threshold; that of no exit where none
    holds them. `cost`: of its one check, in layers.
    """
    full = (traced.full == traced.right).mean()
    for check, n_run in enumerate(traced.layers):
        said = traced.chosen[:, check]
        loss = float(full - (said == traced.right).mean())
        changed = float((said != traced.full).mean())
        if not limits.beyond(loss, changed):
            saved, time_saved = (1 - ran / traced.n_layers for ran in (n_run, n_run + cost))
            return Outcome(float(n_run), loss, saved, changed, 1.0, time_saved)
    return Outcome(float(traced.n_layers), 0.0, 0.0, 0.0, 0.0, 0.0)
