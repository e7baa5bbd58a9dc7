"""What a killed run goes on from: tensors as safetensors, the rest as JSON, replaced whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from shortstack.disk import disk_errors

FACTS = "state.json"


@dataclass
class Position:
    """How far a run is. Randomness needs no saving: that of a step depends on its number alone."""

    step: int = 0
    before: float | None = None
    best: float | None = None
    best_step: int = 0
    recent: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    trained_s: float = 0.0
    wall_s: float = 0.0
    micro_windows: int | None = None


def save(
    folder: Path, key: str, position: Position, tensors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write a state beside the last one, then drop that: a kill leaves one that is whole."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{position.step:09d}"
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with disk_errors(folder):
        partial.mkdir()
        for name, group in tensors.items():
            whole = {k: v.detach().cpu().contiguous() for k, v in group.items()}
            save_file(whole, partial / f"{name}.safetensors")
        facts = {"key": key, **position.__dict__}
        (partial / FACTS).write_text(json.dumps(facts), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    for other in folder.iterdir():
        if other != target:
            shutil.rmtree(other, ignore_errors=True)


def load(folder: Path, key: str) -> tuple[Position, dict[str, dict[str, Tensor]]] | None:
    """The last whole state of the run `key`; None where there is none. One that a machine's crash
    cut short is passed by."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for target in sorted(folder.glob("step-*[0-9]"), reverse=True):
        try:
            facts: dict[str, Any] = json.loads((target / FACTS).read_text(encoding="utf-8"))
            if facts.pop("key") != key:
                continue
            files = sorted(target.glob("*.safetensors"))
            return Position(**facts), {file.stem: load_file(file) for file in files}
        except (SafetensorError, OSError, ValueError, TypeError, KeyError):
            continue
    return None
