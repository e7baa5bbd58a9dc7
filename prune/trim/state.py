"""A trim's progress on disk: weights and optimizer as safetensors, the rest as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
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

    def __init__(self, path: Path, key: str, loose_key: str) -> None:
        """`loose_key` is of the inputs that must agree even after a loss that was not finite."""
        self.path, self._keys = path, {"key": key, "loose_key": loose_key}

    def read(self) -> dict[str, Any] | None:
        """The progress of the same run, or of one like it that was stopped; None where there is
        none."""
        data = self._data()
        if data is None or not (self.path / data["tensors"]).is_file():
            return None
        which = "loose_key" if data.get("stopped") else "key"
        return data if data.get(which) == self._keys[which] else None

    def stop(self) -> None:
        """Note that the run cannot go on from here as it was told to."""
        data = self._data()
        if data is not None:
            write_text(self.path / STATE, json.dumps({**data, "stopped": True}, indent=1) + "\n")

    def _data(self) -> dict[str, Any] | None:
        try:
            data = json.loads((self.path / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return data if isinstance(data, dict) and "tensors" in data else None

    def write(self, progress: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """`progress` must hold `phase`, a number that grows."""
        name = f"state-{progress['phase']:04d}.safetensors"
        self.save(name, tensors)
        data = {**progress, **self._keys, "tensors": name}
        write_text(self.path / STATE, json.dumps(data, indent=1) + "\n")
        self.clear("state-*.safetensors", {name})

    def clear(self, pattern: str, kept: Collection[str]) -> None:
        """Remove the files of a pattern but those named."""
        for file in self.path.glob(pattern):
            if file.name not in kept:
                file.unlink()

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
