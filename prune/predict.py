"""What a cut will cost, before it is made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from shortstack.checkpoint import Checkpoint
from shortstack.prune.apply import prepare
from shortstack.prune.plan import PrunePlan
from shortstack.shards import CHUNK_BYTES

LIBRARIES_BYTES = 320 * 2**20
"""Resident after importing torch and transformers for the last check (measured, torch 2.13 CPU)."""


def preview(checkpoint: Checkpoint, plan: PrunePlan) -> Checkpoint:
    """The pruned checkpoint as headers, before it exists: only for predictions and checks."""
    surgery = prepare(checkpoint, plan)
    tensors = {name: info for _, shard in surgery.layout.shards for name, info in shard.items()}
    return dataclasses.replace(checkpoint, config=surgery.config, tensors=tensors)


def predict_prune(checkpoint: Checkpoint, plan: PrunePlan) -> dict[str, Any]:
    """Predict size, parameters, peak memory and disk of `apply_plan`, from headers alone.

    Raises ShortstackError where `apply_plan` would, for a plan that does not fit the model.
    """
    surgery = prepare(checkpoint, plan)
    texts = (surgery.config_text, plan.to_json())
    output = surgery.layout.n_bytes
    output += sum(len(text.encode()) for text in texts)
    output += sum(file.stat().st_size for file in checkpoint.tokenizer_files)
    shapes = (info.shape for _, shard in surgery.layout.shards for info in shard.values())
    return {
        "n_layers": len(plan.keep),
        "n_params": sum(math.prod(shape) for shape in shapes),
        "weight_bytes": surgery.layout.weight_bytes,
        "output_bytes": output,
        "disk_bytes": output,
        "peak_ram_bytes": LIBRARIES_BYTES + 2 * CHUNK_BYTES,
        "n_shards": len(surgery.layout.shards),
    }
