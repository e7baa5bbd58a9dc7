"""Low-rank updates by peft (Hu et al., arXiv:2106.09685): W + (alpha / rank) B A, then merged."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from shortstack.checkpoint import Checkpoint
from shortstack.errors import MissingExtraError
from shortstack.prune.heal.model import is_gone, stored_name

ALPHA_PER_RANK = 2.0


def add_lora(model: nn.Module, checkpoint: Checkpoint, rank: int) -> None:
    """Give every linear layer of the decoder's layers an update; nothing else learns."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise MissingExtraError("peft", "heal", "training by LoRA") from None
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and checkpoint.family.layer_of(stored := stored_name(f"{name}.weight", checkpoint))
        is not None
        and not is_gone(stored, checkpoint)
    ]
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=round(ALPHA_PER_RANK * rank), target_modules=targets)
    inject_adapter_in_model(config, model)


def merge_lora(model: Any) -> dict[str, Tensor]:
    """Add the updates to the weights in place; returns those weights by their own names."""
    from peft.tuners.lora import LoraLayer

    merged: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module  # merge() is of its other base class
            layer.merge()
            merged[f"{name}.weight"] = layer.get_base_layer().weight
    return merged
