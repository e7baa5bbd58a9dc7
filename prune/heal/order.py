"""Which windows a step reads: the text in a new order in each pass, from step and seed alone."""

from __future__ import annotations

import functools
import hashlib


def mixed_seed(seed: int, number: int) -> int:
    """A seed for the random numbers of one step, pass or batch of a run.

    Mixed, not put together of two halves: PyTorch's generator on a CPU reads the lower 32 bits
    alone.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4], "big")


def rows_of_step(step: int, batch: int, count: int, seed: int) -> list[int]:
    """Rows of step `step` (from 0) among `count` windows."""
    places = (divmod(at, count) for at in range(step * batch, (step + 1) * batch))
    return [_order(epoch, count, seed)[place] for epoch, place in places]


@functools.lru_cache(maxsize=2)  # a step touches two passes at most, unless the text is tiny
def _order(epoch: int, count: int, seed: int) -> tuple[int, ...]:
    import torch

    generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
    return tuple(torch.randperm(count, generator=generator).tolist())
