"""What a trim is told: how to tune, how to choose, where to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shortstack.errors import SettingError, ShortstackError, unknown

MODES = ("progressive", "one-shot", "full")
UNITS = ("sub-block", "block")
FIRST_SCANS = ("tuned", "untuned")
OBJECTIVES = ("answer", "choices")
SCORES = ("scan", "norm", "both", "likelihood")


@dataclass(frozen=True)
class Target:
    """Where the loop stops; `keep` may bound `loss_points`, the others stand alone.

    `keep`: share of sub-blocks (or blocks) left. `loss_points`: how many points of scan accuracy
    may be lost against the full fine-tune, whose accuracy is `full_accuracy` (0 to 1).
    `max_bytes`: of the weights that are left, as float32. `max_latency_ratio`: time of a forward
    pass against the dense model's, from the measured time of each sub-block.
    """

    keep: float | None = None
    loss_points: float | None = None
    full_accuracy: float | None = None
    max_bytes: int | None = None
    max_latency_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ShortstackError(
                f"cannot keep a share of {self.keep}. Use more than 0, at most 1."
            )
        if self.loss_points is not None and self.full_accuracy is None:
            raise ShortstackError(
                "a tolerance needs the accuracy of the full fine-tune. Run mode 'full' first."
            )
        costs = [self.max_bytes, self.max_latency_ratio]
        aims = [self.loss_points if self.keep is None else self.keep, *costs]
        given = sum(aim is not None for aim in aims)
        if given != 1 or (self.loss_points is not None and any(costs)):
            raise ShortstackError(
                "a trim needs one target: a share to keep, a tolerance, bytes or time. "
                "Say e.g. --keep 0.5"
            )

    @property
    def costs(self) -> bool:
        """Whether the target is a cost of what is left, in bytes or seconds."""
        return self.max_bytes is not None or self.max_latency_ratio is not None


@dataclass(frozen=True)
class Settings:
    """How a trim tunes and chooses.

    `ratio`: share of sub-blocks that are trained; 1 trains everything, embeddings and norms too.
    `first_scan`: what to train is chosen by a scan of the model as it came (`untuned`, the paper's
    way) or after one round that trains everything (`tuned`): a model that only guesses on the
    domain's questions has no accuracy to lose, so the scan of it ranks noise.
    `score`: `scan` drops what the accuracy on the scan rows misses least, `norm` what has the
    largest activation norm, `both` breaks the ties of the first by the second (arXiv:2412.11242),
    `likelihood` takes the mean log probability of the right choice among the choices instead of
    the accuracy. `epochs`: passes over `rows_per_epoch` tuning rows before each drop, `last_epochs`
    more at the end. `rate` is the peak of each round's linear decay. `objective`: `answer` makes
    the right continuation likely; `choices` makes it likelier than the question's other choices,
    which is what accuracy asks. All of these are run then: `batch_rows` counts questions.
    """

    mode: str = "progressive"
    unit: str = "sub-block"
    score: str = "both"
    objective: str = "answer"
    ratio: float = 0.25
    first_scan: str = "tuned"
    drop_per_step: int = 1
    epochs: int = 1
    last_epochs: int = 0
    rows_per_epoch: int = 1500
    batch_rows: int = 16
    rate: float = 1e-4
    max_prompt_tokens: int = 512
    protect_first: int = 0
    protect_last: int = 0
    snapshots: tuple[float, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("mode", self.mode, MODES),
            ("unit", self.unit, UNITS),
            ("score", self.score, SCORES),
            ("objective", self.objective, OBJECTIVES),
            ("first scan", self.first_scan, FIRST_SCANS),
        ):
            if name not in known:
                raise unknown(kind, name, known)
        if not 0 < self.ratio <= 1:
            raise ShortstackError(f"cannot train a share of {self.ratio}. Use 0.25, or 1 for all.")
        for name in ("drop_per_step", "epochs", "rows_per_epoch", "batch_rows"):
            if getattr(self, name) < 1:
                raise SettingError(name, f"is {getattr(self, name)}. Use 1 or more.")
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise SettingError("rate", f"is {self.rate}. Use e.g. 1e-4.")
        if any(not 0 < share <= 1 for share in self.snapshots):
            shares = ", ".join(map(str, self.snapshots))
            raise SettingError("snapshots", f"is {shares}: give shares, above 0, at most 1.")
