"""When a prompt or a token leaves: checks after some layers, a linear score, a threshold.

Every rule is of this one form, so that they can be held against each other: AdaInfer's classifier
(arXiv:2403.02181), a fixed threshold on the highest probability, and a depth where all leave.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shortstack.errors import ShortstackError, unknown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ANSWERS, PROBE, VOCABULARY, STATE = "answers", "probe", "vocabulary", "state"
FEATURES = ("top", "gap", "margin")
"""Of a check that sees probabilities: the highest, by how much it leads, the same in logits."""

CHECKS = {
    ANSWERS: "the model's own norm and head, a row of it for each answer",
    PROBE: "a linear map to each answer's logit, fitted for each check",
    VOCABULARY: "the model's own norm and whole head, as AdaInfer's",
    STATE: "the hidden state itself, before any head",
}
"""Check -> what it computes of the hidden state at the last position."""


@dataclass(frozen=True)
class Answer:
    """The number of the answer, and how many layers were run for it."""

    chosen: int
    n_layers: int


@dataclass(frozen=True)
class Rule:
    """`layers`: how many layers are run before each check, rising; every array's first axis.

    score = features @ weights[check] + bias[check]; who has at least `threshold` leaves. `weights`
    have shape (checks, features), `bias` (checks,); of a probe `probe` is (checks, answers, width)
    and `probe_bias` (checks, answers).
    """

    layers: tuple[int, ...]
    check: str
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    threshold: float
    kind: str = "logistic"
    answers: tuple[str, ...] = ()
    """Of a probe: the answers that it knows, in order."""
    probe: NDArray[np.float32] | None = None
    probe_bias: NDArray[np.float32] | None = None
    model_sha256: str = ""
    n_layers: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    """How it was fitted and what it is expected to cost; the prompts' style and examples."""

    def __post_init__(self) -> None:
        if self.check not in CHECKS:
            raise unknown("check of an early exit", self.check, CHECKS)
        rising = list(self.layers) == sorted(set(self.layers))
        if not self.layers or not rising or not 0 < self.layers[0] <= self.layers[-1]:
            raise ShortstackError(
                f"the checks of an early exit must come after rising numbers of layers, got "
                f"{list(self.layers)}. Fit it again."
            )
        if self.n_layers and self.layers[-1] >= self.n_layers:
            raise ShortstackError(
                f"an early exit after {self.layers[-1]} of {self.n_layers} layers is none. "
                "Fit it again."
            )
        self._check_shapes()

    def _check_shapes(self) -> None:
        count = len(self.layers)
        width = self.weights.shape[-1]
        wanted: dict[str, tuple[int, ...]] = {"weights": (count, width), "bias": (count,)}
        if self.check == PROBE:
            known = len(self.answers)
            inner = 0 if self.probe is None else self.probe.shape[-1]
            wanted |= {"probe": (count, known, inner), "probe_bias": (count, known)}
        if self.check != STATE:
            wanted["weights"] = (count, len(FEATURES))
        for name, shape in wanted.items():
            array = getattr(self, name)
            if array is None or array.shape != shape:
                found = None if array is None else array.shape
                raise ShortstackError(
                    f"an early exit's {name} have the shape {found}, {shape} is wanted. "
                    "Fit it again."
                )

    def at(self, n_run: int) -> int | None:
        """The number of the check after `n_run` layers; None where there is none."""
        return self.layers.index(n_run) if n_run in self.layers else None
