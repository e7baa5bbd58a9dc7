"""Where quantizing computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from shortstack.errors import ShortstackError, one_line


def device_of(name: str) -> torch.device:
    """`auto` is a card where there is one. Raises ShortstackError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ShortstackError(
            f"device {name!r} cannot be used ({one_line(str(error), 100)}). Use --device cpu."
        ) from None
    return device


@contextlib.contextmanager
def exact_heads(device: torch.device) -> Iterator[None]:
    """On a card products of float32 as TF32: half the speed of bfloat16, eight times as exact."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
