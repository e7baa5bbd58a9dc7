"""What a check takes, in layers: a fit weighs it against the layers that are not run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CheckCost:
    """`layers`: a check's time over a layer's, of one prompt alone. Where it was measured: the
    times it is made of, in how many `turns`, and where."""

    layers: float
    layer_s: float | None = None
    check_s: float | None = None
    turns: int = 0
    device: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"measured": bool(self.turns), **asdict(self)}


FREE = CheckCost(0.0)
