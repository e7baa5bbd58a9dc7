"""float32 matrices in oneDNN's own order, for a few tokens at a time on a CPU.

PyTorch gives a product of one row to MKL's GEMV, and one of two or three rows to as many of them:
each reads the matrix again. On CPUs where GEMV does not reach the memory's rate, one is slow as
well. oneDNN's kernels for matrices that were put in its order once read them once for some rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shortstack.errors import ShortstackError

FEW_ROWS = 2
"""What the order is chosen for; it is right for any number."""


@contextlib.contextmanager
def reordered(*modules: nn.Module) -> Iterator[None]:
    """Let linear layers of `modules`, while the block runs, multiply by a copy in oneDNN's order.

    The copies take as much memory again. Sums round differently than in PyTorch's own products.
    Raises ShortstackError for what is not float32 on a CPU, and where PyTorch has no oneDNN.
    """
    if not _available():
        raise ShortstackError(
            f"this PyTorch ({torch.__version__}) has no oneDNN that reorders matrices. Leave "
            "them as they are."
        )
    found = {part for module in modules for part in module.modules() if type(part) is nn.Linear}
    wrong = {(part.weight.device.type, part.weight.dtype) for part in found}
    wrong -= {("cpu", torch.float32)}
    if wrong:
        device, dtype = min(wrong, key=str)
        raise ShortstackError(
            f"matrices of {dtype} on {device} are not reordered. Load the model in float32 on "
            "the CPU, or leave them as they are."
        )
    try:
        for part in found:
            # an attribute of the instance shadows the method of the class
            part.__dict__["forward"] = _product(part)
        yield
    finally:
        for part in found:
            part.__dict__.pop("forward", None)


def _available() -> bool:
    ops = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and all(
        hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )


def _product(part: nn.Linear) -> Callable[[Tensor], Tensor]:
    ops: Any = torch.ops.mkldnn
    weight = ops._reorder_linear_weight(part.weight.detach(), FEW_ROWS)
    bias = None if part.bias is None else part.bias.detach()

    def forward(given: Tensor) -> Tensor:
        made: Tensor = ops._linear_pointwise(given, weight, bias, "none", [], "")
        return made

    return forward
