"""What a trim cannot do, told from the headers of a checkpoint before anything is loaded."""

from __future__ import annotations

import math

from shortstack.checkpoint import Checkpoint
from shortstack.prune.trim.model import MODULES, Unit, units_of
from shortstack.prune.trim.schedule import check_target, may_go
from shortstack.prune.trim.settings import Settings, Target


def check_reachable(checkpoint: Checkpoint, settings: Settings, target: Target) -> None:
    """Raise ShortstackError for a target that is not met when all goes that may.

    Of a target in time only what the loop measures can tell that.
    """
    units = units_of(checkpoint.n_layers, settings.unit)
    free = may_go(units, checkpoint.n_layers, settings)
    costs: dict[Unit, float] = {}
    budget = 0.0
    if target.max_bytes is not None:
        costs = {unit: _bytes(checkpoint, unit) for unit in units}
        budget = target.max_bytes - (_all_bytes(checkpoint) - sum(costs.values()))
    check_target(len(units), free, settings, target, costs, budget)


def _bytes(checkpoint: Checkpoint, unit: Unit) -> float:
    """Of a unit's weights as float32; norms are no sub-block's."""
    prefix = checkpoint.family.layer_prefix.format(i=unit.layer)
    prefix += "" if unit.kind == "block" else f"{MODULES[unit.kind]}."
    found = checkpoint.tensors.items()
    return float(sum(4 * math.prod(info.shape) for name, info in found if name.startswith(prefix)))


def _all_bytes(checkpoint: Checkpoint) -> int:
    """Of all weights as float32; a head that is stored though it is the embedding is not loaded."""
    spare = checkpoint.tensors.get(checkpoint.family.head.hf)
    tied = spare is not None and bool(checkpoint.config.get("tie_word_embeddings"))
    return 4 * (checkpoint.n_params - (math.prod(spare.shape) if spare and tied else 0))
