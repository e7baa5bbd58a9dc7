"""What exits are before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shortstack.checkpoint import Checkpoint
from shortstack.errors import unknown
from shortstack.exits.folder import INITS, WITH_LAYER, layer_rules
from shortstack.exits.model import base_tensors
from shortstack.prune.heal.order import mixed_seed


def starting_tensors(
    model: Any, checkpoint: Checkpoint, exits: Sequence[int], init: str, seed: int
) -> dict[int, dict[str, Tensor]]:
    """Float32 tensors of each exit: `norm.weight` and `layer.` with the names inside a layer.

    The norm is the model's own before the head. The layer is a copy of the last one (Balcony,
    section on initialisation), or, its ablation, random: matrices normal with the config's
    `initializer_range`, norms neutral, biases zero. Raises ShortstackError for an unknown `init`.
    """
    if init not in INITS:
        raise unknown("init of exits", init, INITS)
    made = {}
    for exit in exits:
        copies = base_tensors(model, checkpoint)
        if init not in WITH_LAYER:
            copies = {"norm.weight": copies["norm.weight"]}
        made[exit] = copies
        if init == "random":
            _randomise(copies, model, checkpoint, mixed_seed(seed, exit))
    return made


def _randomise(tensors: dict[str, Tensor], model: Any, checkpoint: Checkpoint, seed: int) -> None:
    spread = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    generator = torch.Generator().manual_seed(seed)
    for rule in layer_rules(checkpoint):
        tensor = tensors[f"layer.{rule.hf}"]
        if tensor.ndim > 1:
            tensor.normal_(0.0, spread, generator=generator)
        else:
            tensor.fill_(0.0 if rule.hf.endswith(".bias") else 1.0 - rule.plus)
