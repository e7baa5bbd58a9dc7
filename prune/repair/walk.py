"""A model part-way through its layers, its hidden states in files: nothing is computed twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from shortstack.prune.calibrate import LayerwiseModel
from shortstack.prune.repair.maps import Map


class Walk:
    """Token batches in front of layer `position` of a model.

    `hidden` and `mlp` (the last layer's MLP output, if asked for) hold a tensor a batch, of shape
    (windows, length, width), float32, mapped from files in `folder`: memory holds one batch at a
    time.
    """

    def __init__(
        self, model: LayerwiseModel, parts: list[Tensor], folder: Path, *, keep_mlp: bool = False
    ) -> None:
        self._model, self._parts, self.position = model, parts, 0
        folder.mkdir()
        self.hidden: list[Tensor] = []
        self.mlp: list[Tensor | None] = []
        for number, tokens in enumerate(parts):
            embedded = model.embed(tokens)
            self.hidden.append(_mapped(folder / f"hidden-{number}", embedded.shape))
            self.hidden[-1].copy_(embedded)
            self.mlp.append(_mapped(folder / f"mlp-{number}", embedded.shape) if keep_mlp else None)

    @property
    def model(self) -> LayerwiseModel:
        return self._model

    @property
    def n_predicted(self) -> int:
        """Tokens that `nats` is summed over: all but the first of each window."""
        return sum(tokens[:, 1:].numel() for tokens in self._parts)

    def advance(self, position: int) -> None:
        """Run the layers up to `position`."""
        if position == self.position:
            return
        for hidden, mlp in zip(self.hidden, self.mlp, strict=True):
            now = hidden.to(self._model.dtype, copy=True)
            for index in range(self.position, position - 1):
                now = self._model.layer(index, now)
            if mlp is None:
                now = self._model.layer(position - 1, now)
            else:
                now, output = self._model.layer_and_mlp(position - 1, now)
                mlp.copy_(output)
            hidden.copy_(now)
        self.position = position

    def apply(self, repair: Map) -> None:
        """Repair the hidden states here; the layers above get what it gives."""
        for hidden, mlp in zip(self.hidden, self.mlp, strict=True):
            hidden.copy_(repair.apply(hidden, mlp))

    def nats(self, repair: Map | None = None) -> float:
        """Negative log likelihood of all tokens, summed, if nothing above is repaired."""
        total = 0.0
        for tokens, hidden, mlp in zip(self._parts, self.hidden, self.mlp, strict=True):
            now = hidden if repair is None else repair.apply(hidden, mlp)
            now = now.to(self._model.dtype, copy=True)
            for index in range(self.position, self._model.n_layers):
                now = self._model.layer(index, now)
            total += self._model.nats(now, tokens)
        return total

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Hidden states and MLP outputs, batch by batch."""
        yield from zip(self.hidden, self.mlp, strict=True)


def _mapped(file: Path, shape: torch.Size) -> Tensor:
    mapped = torch.from_file(str(file), shared=True, size=shape.numel(), dtype=torch.float32)
    return mapped.view(shape)
