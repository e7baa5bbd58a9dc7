"""PrunePlan: which layers go, as data that can be printed, saved and applied later."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortstack.errors import ShortstackError, unknown

SCHEMA = 2
FLOAT32_MAX = 3.4e38


@dataclass(frozen=True)
class Removal:
    """Whole layers, and layers of which only the attention or only the MLP goes."""

    layers: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()


@dataclass(frozen=True)
class PrunePlan:
    """Layers to drop from a model of `n_layers`, numbered from 0 as in the original.

    `attention` and `mlp` are layers that lose only that sub-block. `merge` gives a kept layer the
    weighted sum of several layers' tensors (layer -> source layer -> weight), `replace` the
    tensors of a safetensors file (layer -> path; names as in one layer, `mlp.up_proj.weight`).

    `scores` holds one number a layer, in the method's own unit, higher means keep; empty if the
    method scores nothing, None for a layer that was protected and so never scored.
    """

    n_layers: int
    drop: tuple[int, ...]
    method: str
    scores: tuple[float | None, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    merge: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    replace: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layers in (self.drop, self.attention, self.mlp):
            if list(layers) != sorted(set(layers)):
                raise ShortstackError(
                    f"layers to drop must be sorted and unique, got {_list(layers)}. "
                    f"Write: {_list(tuple(sorted(set(layers))))}"
                )
        named = [*self.drop, *self.attention, *self.mlp, *self.merge, *self.replace]
        named += [source for parts in self.merge.values() for source in parts]
        outside = [index for index in named if not 0 <= index < self.n_layers]
        if outside:
            raise ShortstackError(
                f"there is no layer {outside[0]}: the model has layers 0 to {self.n_layers - 1}. "
                "Drop only those."
            )
        if len(self.drop) >= self.n_layers:
            raise ShortstackError(
                f"dropping all {self.n_layers} layers leaves no model. Keep at least one."
            )
        self._check_changed()
        self._check_weights()
        if self.scores and len(self.scores) != self.n_layers:
            raise ShortstackError(
                f"the plan has {len(self.scores)} scores for {self.n_layers} layers. Plan again."
            )

    @property
    def keep(self) -> tuple[int, ...]:
        """Kept layers by their original number; the position is the new number."""
        dropped = set(self.drop)
        return tuple(index for index in range(self.n_layers) if index not in dropped)

    @property
    def removal(self) -> Removal:
        return Removal(self.drop, self.attention, self.mlp)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the pruned model, as JSON-able data; not how it was chosen."""
        ours = ("n_layers", "drop", "attention", "mlp", "merge", "replace")
        data = dataclasses.asdict(self)
        return {name: data[name] for name in ours if data[name] or name in ("n_layers", "drop")}

    def _check_changed(self) -> None:
        """A layer that is changed must stay, and be changed in one way only."""
        changed = [*self.attention, *self.mlp, *self.merge, *self.replace]
        gone = sorted(set(changed) & set(self.drop))
        if gone:
            raise ShortstackError(
                f"layer {gone[0]} is dropped and changed at once. Name it once in the plan."
            )
        twice = sorted({index for index in changed if changed.count(index) > 1})
        if twice and twice[0] in self.attention and twice[0] in self.mlp:
            raise ShortstackError(
                f"layer {twice[0]} loses attention and MLP, so nothing of it is left. "
                f"Drop the whole layer: {twice[0]}"
            )
        if twice:
            raise ShortstackError(
                f"layer {twice[0]} is changed in two ways by the plan. Choose one of them."
            )

    def _check_weights(self) -> None:
        """A layer made of nothing would be zeros, which no runtime would find strange."""
        for layer, parts in self.merge.items():
            wrong = [w for w in parts.values() if not -FLOAT32_MAX <= w <= FLOAT32_MAX]
            if wrong or not any(parts.values()):
                fact = f"has the weight {wrong[0]}" if wrong else "adds up nothing"
                raise ShortstackError(
                    f"the merge into layer {layer} {fact}. Give weights of layers, e.g. "
                    f'"{layer}": {{"{layer}": 0.5, "{(layer + 1) % self.n_layers}": 0.5}}'
                )

    def to_json(self) -> str:
        data = {"schema": SCHEMA, **dataclasses.asdict(self)}
        return json.dumps(data, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PrunePlan:
        """Read what `to_json` wrote. Raises ShortstackError for anything else."""
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
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
        if not _all_finite(data):
            raise ShortstackError("the plan has a number that is not finite. Plan again.")
        scores = tuple(None if score is None else float(score) for score in data["scores"])
        return cls(
            data["n_layers"],
            tuple(data["drop"]),
            data["method"],
            scores,
            data["facts"],
            attention=tuple(data["attention"]),
            mlp=tuple(data["mlp"]),
            merge={
                int(layer): {int(source): float(w) for source, w in parts.items()}
                for layer, parts in data["merge"].items()
            },
            replace={int(layer): file for layer, file in data["replace"].items()},
        )


def read_plan(file: Path) -> PrunePlan:
    """Read a plan file. Raises ShortstackError that names the file and what is wrong in it."""
    try:
        return PrunePlan.from_json(file.read_text(encoding="utf-8"))
    except ShortstackError as error:
        raise ShortstackError(f"{file}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        fact = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ShortstackError(
            f"{file} is no plan that can be read: {fact}. Run: shortstack plan"
        ) from None


def parse_drop(text: str) -> tuple[int, ...]:
    """Read `11-15,20` (both ends counted) as sorted layer numbers.

    Raises ShortstackError for anything else, an overlap and sub-blocks included.
    """
    removal = parse_removal(text)
    if removal.attention or removal.mlp:
        raise ShortstackError(
            f"{text!r} names sub-blocks; here only whole layers can go. Write e.g. 11-15,20"
        )
    return removal.layers


def parse_removal(text: str) -> Removal:
    """Read `11-15,20,3.attention,5-7.mlp`: whole layers, and layers that lose one sub-block.

    Raises ShortstackError for anything else, an overlap included.
    """
    texts: dict[str, list[str]] = {"": [], "attention": [], "mlp": []}
    for part in text.split(","):
        numbers, _, kind = part.partition(".")
        if kind.strip() not in texts:
            wrong = unknown("sub-block", kind.strip(), ("attention", "mlp"))
            raise ShortstackError(f"{wrong} Write e.g. 3.attention")
        texts[kind.strip()].append(numbers)
    return Removal(*(_parse_layers(found, text) for found in texts.values()))


def _parse_layers(parts: list[str], text: str) -> tuple[int, ...]:
    layers: list[int] = []
    for part in parts:
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
    lists = ("drop", "attention", "mlp")
    whole = [data["n_layers"]]
    for name in lists:
        whole += data[name] if isinstance(data[name], list) else [None]
    return (
        all(type(value) is int for value in whole)
        and _maps_layers(data["replace"], str)
        and _maps_layers(data["merge"], dict)
        and all(_maps_layers(parts, (int, float)) for parts in data["merge"].values())
        and isinstance(data["method"], str)
        and isinstance(data["facts"], dict)
        and isinstance(data["scores"], list)
        and all(score is None or isinstance(score, (int, float)) for score in data["scores"])
    )


def _maps_layers(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, dict) and all(
        key.isdecimal()
        and str(int(key)) == key  # "02" would be layer 2 a second time
        and isinstance(item, kind)
        and not isinstance(item, bool)
        for key, item in value.items()
    )


def _all_finite(data: Any) -> bool:
    try:
        json.dumps(data, allow_nan=False)
    except ValueError:
        return False
    return True


def _list(layers: tuple[int, ...]) -> str:
    return ",".join(map(str, layers))
