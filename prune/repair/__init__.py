"""Repair a cut without training: what the dropped layers did on average, as ordinary weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shortstack.checkpoint import Checkpoint
from shortstack.errors import require, unknown
from shortstack.progress import OnProgress, silent
from shortstack.prune.plan import PrunePlan

__all__ = ["CHOICES", "REPAIRS", "Repair", "repair"]


@dataclass(frozen=True)
class Repair:
    """One way to repair: where its fit is, what it becomes, and what it has to know.

    `kind`: `shift` and `output` change the layer before a gap, `scale` everything before it;
    `slot` and `own` add a layer without attention. `features` and `rotated`: see `Statistics`.
    """

    target: str
    kind: Literal["shift", "scale", "output", "slot", "own"]
    features: Literal["", "mlp", "normed", "own"] = ""
    rotated: bool = False


REPAIRS = {
    "bias": Repair("shortstack.prune.repair.bias:fit", "shift"),
    "scale": Repair("shortstack.prune.repair.scale:fit", "scale"),
    "least-squares": Repair("shortstack.prune.repair.least_squares:fit", "output", "mlp"),
    "patch": Repair("shortstack.prune.repair.patch:fit", "slot", "normed", rotated=True),
    "ghost": Repair("shortstack.prune.repair.ghost:fit", "slot", "normed"),
    "refit": Repair("shortstack.prune.repair.refit:fit", "own", "own"),
}
"""Name -> repair. A new one: a module and a line here."""

CHOICES = {
    "auto": tuple(REPAIRS),
    "folded": tuple(name for name, made in REPAIRS.items() if made.kind not in ("slot", "own")),
    **{name: (name,) for name in REPAIRS},
}
"""What can be asked for -> the repairs that are tried; `folded` are those that add no layer."""


def repair(
    original: Checkpoint,
    pruned: Checkpoint,
    plan: PrunePlan,
    calibration: list[list[int]],
    selection: list[list[int]],
    out: Path,
    *,
    method: str = "auto",
    dtype: str = "auto",
    progress: OnProgress = silent,
) -> tuple[Checkpoint, dict[str, Any]]:
    """Write `pruned`, repaired, into the existing empty folder `out`; return it and the facts.

    `plan` made `pruned` out of `original`. Repairs are fitted on the windows `calibration`; at each
    gap one stays only if the perplexity on the windows `selection` falls, and of all repairs
    tried the one with the lowest is written. If none lowers it, `out` equals `pruned`. `dtype` is
    what both models compute in; sums and solutions are float64. Raises
    ShortstackError for an unknown method, one that this model cannot hold, a `pruned` that is not
    made of `original`, and too little text.
    """
    if method not in CHOICES:
        raise unknown("repair", method, CHOICES)
    require(("torch", "transformers"), "prune", "repairing a model")
    from shortstack.prune.repair.drive import run

    return run(original, pruned, plan, calibration, selection, out, method, dtype, progress)
