"""Which windows a step reads: the text in a new order in each pass, from step and seed alone."""

from __future__ import annotations

import functools


def rows_of_step(step: int, batch: int, count: int, seed: int) -> list[int]:
    """Rows of step `step` (from 0) among `count` windows."""
    places = (divmod(at, count) for at in range(step * batch, (step + 1) * batch))
    return [_order(epoch, count, seed)[place] for epoch, place in places]


@functools.lru_cache(maxsize=2)  # a step touches two passes at most, unless the text is tiny
def _order(epoch: int, count: int, seed: int) -> tuple[int, ...]:
    import torch

    generator = torch.Generator().manual_seed((seed << 32) + epoch)
    return tuple(torch.randperm(count, generator=generator).tolist())
