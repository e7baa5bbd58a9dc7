"""Tensors that may lie in shards over the processes (FSDP): taken whole, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def whole(tensor: Any) -> Tensor:
    """All of a tensor; every process has to ask for it."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies in float32 on the CPU."""
    return {n: whole(t.detach()).to("cpu", torch.float32, copy=True) for n, t in tensors.items()}


def put(targets: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
    """Fill tensors, sharded or not, with the whole `values` of their names."""
    for name, target in targets.items():
        value = values[name].to(target.device)
        if hasattr(target, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, target.device_mesh, target.placements)
        with torch.no_grad():
            target.copy_(value)
