"""Classifiers that say whether an answer is the final one already; scikit-learn fits them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortstack.errors import require, unknown

Floats = NDArray[np.float32]
SURE = 20.0
"""Score of a check at which all rows fitted to agreed with the whole model (less: none did)."""
FEW = 16
"""More features than these (a whole state) are fitted with a stronger penalty."""
LEAST = 1e-6
"""Features that vary less are constant."""


def _logistic(strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=1000)


def _svm(strength: float) -> Any:
    from sklearn.svm import LinearSVC

    return LinearSVC(C=strength, max_iter=10_000)


CLASSIFIERS: dict[str, Callable[[float], Any]] = {"logistic": _logistic, "svm": _svm}
"""Name -> a linear classifier of scikit-learn: AdaInfer's are of this kind. A new one: a line."""


def fit_classifier(kind: str, features: Floats, same: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Weights (checks, features) and biases (checks,): one classifier for each check.

    `features` (rows, checks, features); `same` (rows, checks): whether the answer there is the
    whole model's. Features are standardized for the fit; the weights returned act on them as they
    are. Raises ShortstackError for a kind that is not known, MissingExtraError without
    scikit-learn.
    """
    if kind not in CLASSIFIERS:
        raise unknown("classifier", kind, CLASSIFIERS)
    require(("sklearn",), "exits", "fitting an early exit")
    made = [_fitted(kind, features[:, check], same[:, check]) for check in range(features.shape[1])]
    weights, biases = zip(*made, strict=True)
    return np.stack(weights).astype(np.float32), np.asarray(biases, np.float32)


def _fitted(kind: str, features: Floats, same: NDArray[np.bool_]) -> tuple[Floats, float]:
    if same.all() or not same.any():  # nothing to tell apart
        return np.zeros(features.shape[1], np.float32), SURE if same.all() else -SURE
    values = features.astype(np.float64)
    mean, scale = values.mean(0), values.std(0)
    scale[scale < LEAST] = 1.0
    strength = 1.0 if features.shape[1] <= FEW else 1 / features.shape[1]
    model = CLASSIFIERS[kind](strength).fit((values - mean) / scale, same)
    weights = model.coef_[0] / scale
    return weights.astype(np.float32), float(model.intercept_[0] - mean @ weights)


def top_rule(checks: int, width: int) -> tuple[Floats, Floats]:
    """Weights of the rule without a classifier: the score is the highest probability."""
    weights = np.zeros((checks, width), np.float32)
    weights[:, 0] = 1.0
    return weights, np.zeros(checks, np.float32)
