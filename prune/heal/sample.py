"""Training text from the teacher itself, where open text is scarce."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortstack.checkpoint import Checkpoint
from shortstack.disk import disk_errors
from shortstack.pretrained import load
from shortstack.progress import OnProgress, silent
from shortstack.prune.heal.order import mixed_seed

BATCH = {"cpu": 16, "cuda": 256}


def sampled_windows(
    teacher: Checkpoint,
    beginnings: Sequence[Sequence[int]],
    length: int,
    count: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    batch: int | None = None,
    device: str = "auto",
    progress: OnProgress = silent,
) -> list[list[int]]:
    """`count` windows of `length` tokens drawn from the teacher's own distribution.

    Each begins with one of `beginnings` (token ids, all of one length: the beginning-of-text
    token, or the first tokens of a training document), taken in turn. An end-of-text token is a
    token like others: the teacher goes on behind it as it would. Progress counts windows.
    """
    chosen = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    model = load(teacher.path, dtype).to(chosen)
    starts = torch.tensor([list(tokens) for tokens in beginnings])
    made: list[list[int]] = []
    size = batch or BATCH[chosen.type]
    for at in range(0, count, size):
        # a generator for each batch: which windows come does not depend on how many are wanted
        generator = torch.Generator(chosen).manual_seed(mixed_seed(seed, at))
        rows = torch.arange(at, min(count, at + size)) % len(starts)
        made += _continued(model, starts[rows].to(chosen), length, temperature, generator).tolist()
        progress(len(made), count)
    return made


def kept_windows(
    file: Path, key: str, make: Callable[[], list[list[int]]], *, first: bool
) -> list[list[int]]:
    """What `make` gives, kept in a safetensors file for a run that is killed and goes on.

    Of several processes the first one makes it; the others wait for the file. Samples of two GPUs
    would differ, and with them what the processes believe to be one text.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    while True:
        if file.is_file():
            with safe_open(file, framework="pt") as stored:
                if (stored.metadata() or {}).get("key") == key:
                    found: list[list[int]] = stored.get_tensor("windows").tolist()
                    return found
        if first:
            break
        time.sleep(0.5)
    made = make()
    partial = file.with_name(f"{file.name}.partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(file.parent):
        save_file({"windows": torch.tensor(made, dtype=torch.int32)}, partial, {"key": key})
        os.replace(partial, file)
    return made


@torch.no_grad()
def _continued(
    model: Any, tokens: Tensor, length: int, temperature: float, generator: torch.Generator
) -> Tensor:
    """Append tokens up to `length`, through the model's own KV cache."""
    known, fresh = None, tokens
    while tokens.shape[1] < length:
        output = model(input_ids=fresh, past_key_values=known, use_cache=True, logits_to_keep=1)
        known = output.past_key_values
        odds = (output.logits[:, -1].float() / temperature).softmax(-1)
        fresh = torch.multinomial(odds, 1, generator=generator)
        tokens = torch.cat([tokens, fresh], 1)
    return tokens[:, :length]
