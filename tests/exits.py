"""Exits of a small model for tests, not trained: other numbers than the base's, so that it shows
which are in force."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from shortstack.checkpoint import Checkpoint
from shortstack.exits.folder import ExitFolder, write_exits
from shortstack.pretrained import load
from shortstack.prune.exits.start import starting_tensors


def make_exits(
    base: Path, out: Path, exits: Sequence[int] = (2, 4), init: str = "last"
) -> ExitFolder:
    """A folder of exits whose tensors are those of `init` with a tenth of noise."""
    checkpoint = Checkpoint.open(base)
    start = starting_tensors(load(base, torch.float32), checkpoint, exits, init, 0)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"exits.{exit}.{name}": tensor * (1 + 0.1 * torch.randn(tensor.shape, generator=generator))
        for exit, given in start.items()
        for name, tensor in given.items()
    }
    out.mkdir(parents=True)
    return write_exits(out, checkpoint, exits, init, tensors, {"tokens": 0})
