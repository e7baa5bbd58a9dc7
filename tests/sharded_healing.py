"""Run by torchrun in two processes: a student in shards (FSDP2) has the loss and the gradients of
a whole one, and its tensors come back whole. Prints what it compared.

Accelerate shards on GPUs only, so this shards as it does there, by torch's own `fully_shard`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard

from shortstack.checkpoint import Checkpoint
from shortstack.pretrained import load
from shortstack.prune.heal.model import Student, freeze
from shortstack.prune.heal.settings import HealSettings
from shortstack.prune.heal.sharded import copies, put


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    settings = HealSettings(tokens=1, loss="mix", device="cpu")
    checkpoint = Checkpoint.open(folder)
    tokens = torch.arange(2 * 2 * 24).reshape(2, 2, 24) * 5 % checkpoint.dims["vocab"]

    def student() -> Student:
        model = load(folder, torch.float32)
        freeze(model, checkpoint, settings)
        return Student(model, load(folder, torch.float32), settings).train()

    whole, parts = student(), student()
    with torch.no_grad():  # or teacher and student would agree
        for model in (whole, parts):
            for parameter in model.model.parameters():
                parameter.mul_(1.1)
    inner: Any = parts.model
    for layer in inner.get_decoder().layers:
        fully_shard(layer)
    fully_shard(parts)
    (sum(whole(rows) for rows in tokens) / 2).backward()  # shards are averaged over processes
    loss = parts(tokens[rank])
    loss.backward()
    distributed.all_reduce(loss.detach_())
    sharded: dict[str, Any] = {n: p for n, p in inner.named_parameters() if p.grad is not None}
    gradients = copies({name: p.grad for name, p in sharded.items()})
    wanted: dict[str, Any] = {n: p.grad for n, p in whole.model.named_parameters()}
    worst = max(float((gradients[name] - wanted[name]).abs().max()) for name in gradients)
    largest = max(
        float(gradient.abs().max()) for gradient in wanted.values() if gradient is not None
    )
    put(sharded, {name: 3 * values for name, values in copies(sharded).items()})
    back = copies(sharded)
    kept = all(torch.equal(back[n], 3 * p) for n, p in whole.model.named_parameters() if n in back)
    split = all(p.to_local().numel() < p.numel() for p in sharded.values())
    if rank == 0:
        facts = {"worst": worst, "largest": largest, "kept": kept, "split": split}
        print(json.dumps({**facts, "loss": loss.item(), "n": len(sharded)}))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
