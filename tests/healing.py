"""What tests of healing share: settings of a short run, and a checkpoint's bytes."""

from __future__ import annotations

from typing import Any

from shortstack.checkpoint import Checkpoint
from shortstack.prune.heal.settings import HealSettings
from shortstack.shards import ShardReader

LENGTH = 64
Windows = tuple[list[list[int]], list[list[int]]]


def settings(**changed: Any) -> HealSettings:
    """Ten steps of eight windows on the CPU."""
    usual: dict[str, Any] = {"tokens": 10 * 8 * LENGTH, "window_tokens": LENGTH}
    usual |= {"batch_windows": 8, "device": "cpu", "dtype": "float32", "learning_rate": 1e-3}
    return HealSettings(**usual | changed)


def read(checkpoint: Checkpoint) -> dict[str, bytes]:
    with ShardReader(checkpoint) as reader:
        return {name: b"".join(reader.chunks(name)) for name in checkpoint.tensors}
