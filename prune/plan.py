"""PrunePlan: which layers go, as data that can be printed, saved and applied later."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shortstack.errors import ShortstackError

SCHEMA = 1


@dataclass(frozen=True)
class PrunePlan:
    """Layers to drop from a model of `n_layers`, numbered from 0 as in the original.

    `scores` holds one number a layer, in the method's own unit, higher means keep; empty if the
    method scores nothing, None for a layer that was protected and so never scored.
    """

    n_layers: int
    drop: tuple[int, ...]
    method: str
    scores: tuple[float | None, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if list(self.drop) != sorted(set(self.drop)):
            raise ShortstackError(
                f"layers to drop must be sorted and unique, got {_list(self.drop)}. "
                f"Write: {_list(tuple(sorted(set(self.drop))))}"
            )
        outside = [index for index in self.drop if not 0 <= index < self.n_layers]
        if outside:
            raise ShortstackError(
                f"there is no layer {outside[0]}: the model has layers 0 to {self.n_layers - 1}. "
                "Drop only those."
            )
        if len(self.drop) >= self.n_layers:
            raise ShortstackError(
                f"dropping all {self.n_layers} layers leaves no model. Keep at least one."
            )
        if self.scores and len(self.scores) != self.n_layers:
            raise ShortstackError(
                f"the plan has {len(self.scores)} scores for {self.n_layers} layers. Plan again."
            )

    @property
    def keep(self) -> tuple[int, ...]:
        """Kept layers by their original number; the position is the new number."""
        dropped = set(self.drop)
        return tuple(index for index in range(self.n_layers) if index not in dropped)

    def to_json(self) -> str:
        data = {"schema": SCHEMA, **dataclasses.asdict(self)}
        return json.dumps(data, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PrunePlan:
        """Read what `to_json` wrote. Raises ShortstackError for anything else."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ShortstackError(f"the plan is not JSON ({error}). Plan again.") from None
        names = {"schema", *(f.name for f in dataclasses.fields(cls))}
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else None
            raise ShortstackError(
                f"the plan has schema {found!r}, this version reads {SCHEMA}. Plan again."
            )
        wrong = sorted(set(data) ^ names)
        if wrong:
            raise ShortstackError(
                f"the plan has an unknown or missing field {wrong[0]!r}. Plan again."
            )
        if not _well_typed(data):
            raise ShortstackError("the plan has a field of the wrong type. Plan again.")
        scores = tuple(None if score is None else float(score) for score in data["scores"])
        drop = tuple(data["drop"])
        return cls(data["n_layers"], drop, data["method"], scores, data["facts"])


def parse_drop(text: str) -> tuple[int, ...]:
    """Read `11-15,20` (both ends counted) as sorted layer numbers.

    Raises ShortstackError for anything else, an overlap included.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        first = int(match[1]) if match else 0
        last = int(match[2] or first) if match else -1
        if last < first:
            raise ShortstackError(
                f"cannot read layers {text!r}: {part.strip()!r} is no number or rising range. "
                "Write e.g. 11-15,20"
            )
        layers += range(first, last + 1)
    if len(set(layers)) != len(layers):
        raise ShortstackError(f"layers {text!r} name one layer twice. Write each once.")
    return tuple(sorted(layers))


def _well_typed(data: Mapping[str, Any]) -> bool:
    whole = [data["n_layers"], *data["drop"]] if isinstance(data["drop"], list) else [None]
    return (
        all(type(value) is int for value in whole)
        and isinstance(data["method"], str)
        and isinstance(data["facts"], dict)
        and isinstance(data["scores"], list)
        and all(score is None or isinstance(score, (int, float)) for score in data["scores"])
    )


def _list(layers: tuple[int, ...]) -> str:
    return ",".join(map(str, layers))
