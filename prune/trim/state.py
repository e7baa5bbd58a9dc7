"""A trim's progress on disk: weights and optimizer as safetensors, the rest as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.disk import disk_errors
from shortstack.manifest import write_text

if TYPE_CHECKING:
    from torch import Tensor

    from shortstack.prune.trim.tune import Tuner

STATE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class StateFolder:
    """Saved after every finished phase. state.json names the tensor file it belongs to and is
    replaced last, so that a kill leaves the old state or the new one, whole."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self._key = path, key

    def read(self) -> dict[str, Any] | None:
        """The progress of the same run; None where there is none."""
        try:
            data = json.loads((self.path / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(data, dict) or data.get("key") != self._key:
            return None
        return data if (self.path / data["tensors"]).is_file() else None

    def write(self, progress: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """`progress` must hold `phase`, a number that grows."""
        name = f"state-{progress['phase']:04d}.safetensors"
        self.save(name, tensors)
        data = {**progress, "key": self._key, "tensors": name}
        write_text(self.path / STATE, json.dumps(data, indent=1) + "\n")
        for old in self.path.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one tensor file, whole or not at all."""
        from safetensors.torch import save_file

        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.path / f".{name}.partial"
        held = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
        with disk_errors(self.path):
            save_file(held, partial)
            os.replace(partial, self.path / name)

    def load(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.path / name)


def optimizer_tensors(tuner: Tuner) -> dict[str, Tensor]:
    """AdamW's moments by parameter name, under names that no weight has."""
    found = {}
    for name, parameter in tuner.parameters.items():
        for moment, value in tuner.optimizer.state.get(parameter, {}).items():
            found[f"{moment}/{name}"] = value
    return found


def restore(tuner: Tuner, tensors: Mapping[str, Tensor]) -> None:
    """Put back the moments that were saved with the weights."""
    # A step count stays where AdamW makes it: on the GPU only when fused.
    fused = bool(tuner.optimizer.defaults.get("fused"))
    for name, parameter in tuner.parameters.items():
        saved = {m: tensors[f"{m}/{name}"] for m in MOMENTS if f"{m}/{name}" in tensors}
        if saved:
            tuner.optimizer.state[parameter] = {
                m: v.to(parameter.device) if m != "step" or fused else v for m, v in saved.items()
            }
