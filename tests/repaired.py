"""What the tests of repairs share: random numbers, cut folders, logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from shortstack.checkpoint import Checkpoint
from shortstack.prune import PrunePlan, apply_plan

TOKENS = [[(7 * i * i + 13 * i + 5 * row) % 96 for i in range(24)] for row in range(6)]
EPSILON = 1e-6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cut(original: Checkpoint, plan: PrunePlan, folder: Path) -> Checkpoint:
    folder.mkdir()
    return apply_plan(original, plan, folder)


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.float32)


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(torch.tensor(TOKENS), use_cache=False).logits
    return result
