"""Linear layers in AWQ's GEMM layout, multiplied by autoawq's Triton kernel, on CUDA.

The layout is that of AWQ models (Lin et al. 2023, arXiv 2306.00978): 4 bits, asymmetric, groups of
128 along the input. Weights are rounded to nearest here; AWQ's search for scales is not run. So
speed and memory are those of an AWQ model, answers are not.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shortstack.errors import ShortstackError, require
from shortstack.pretrained import load, of_decoder

GROUP = 128
"""Inputs that share a scale and a zero: what AWQ models have."""
CODES = 8
"""Codes of 4 bits in an int32."""
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of 8 neighbouring outputs lies in each nibble, the lowest first."""
MANY_ROWS = 1024
"""From so many on autoawq's own module turns the weights into float16 before it multiplies."""
BLOCK_K = 32
"""Inputs that the kernel takes in one step, as autoawq calls it."""
SMALLEST_SCALE = 1e-5
"""autoawq's: a group of zeros has a scale, too."""
KERNEL_FILE = "awq/modules/triton/gemm.py"
INSTALL = "pip install --no-deps autoawq==0.2.7.post3"
"""Without what it depends on: one file of it is used, which needs torch and triton alone."""


@dataclass(frozen=True)
class Kernels:
    """The two functions of autoawq's file."""

    gemm: Callable[..., torch.Tensor]
    dequantize: Callable[..., torch.Tensor]


@functools.cache
def kernels() -> Kernels:
    """autoawq's Triton functions, without `import awq`, which wants all that autoawq depends on.

    Raises ShortstackError where autoawq or triton is missing or is another than we know.
    """
    try:
        file = Path(str(importlib.metadata.distribution("autoawq").locate_file(KERNEL_FILE)))
    except importlib.metadata.PackageNotFoundError:
        raise ShortstackError(
            f"quantize=awq-int4 needs the package 'autoawq', which is not installed. Run: {INSTALL}"
        ) from None
    name = "shortstack.runtimes._autoawq_gemm"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ShortstackError(f"autoawq has no {KERNEL_FILE} here. Run: {INSTALL}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # triton looks its functions' module up
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        del sys.modules[name]
        raise ShortstackError(
            f"quantize=awq-int4 needs the package {error.name!r}, which is not installed. "
            f"Run: pip install {error.name}"
        ) from None
    return Kernels(module.awq_gemm_triton, module.awq_dequantize_triton)


def load_awq(path: Path, device: torch.device) -> Any:
    """The model on `device` in float16, its linear layers but the head as AwqLinear.

    All of it is on the device in float16 first, then each layer is turned and its float16 weight
    freed. The kernels are compiled here. Raises ShortstackError where they are missing,
    MissingExtraError without accelerate.
    """
    require(("accelerate",), "quantize", "quantize=awq-int4")
    kernels()
    model = load(path, torch.float16, device=device)
    with torch.inference_mode(False), torch.no_grad():
        convert(model)
        if device.type == "cuda":
            _return_memory(model, device)
        _compile(model)
    return model


def convert(model: Any) -> None:
    """Replace, in place, the decoder's nn.Linear but the head by AwqLinear where the widths fit:
    inputs a multiple of 128, outputs one of 8."""
    head = model.get_output_embeddings()
    names = [
        name
        for name, one in model.named_modules()
        if isinstance(one, torch.nn.Linear)
        and one is not head
        and of_decoder(name)
        and one.in_features % GROUP == 0
        and one.out_features % CODES == 0
    ]
    for name in names:
        above, _, last = name.rpartition(".")
        parent = model.get_submodule(above)
        setattr(parent, last, AwqLinear(getattr(parent, last)))


def _return_memory(model: Any, device: torch.device) -> None:
    """Give the float16 weights' memory back to the card. transformers takes one block for all
    weights, which stays taken as long as anything lies in it: so all leaves it for a moment."""
    model.to("cpu")
    torch.cuda.empty_cache()
    model.to(device)


def _compile(model: Any) -> None:
    """Multiply once with either kernel: what fails to compile fails while the session opens."""
    layer = next((one for one in model.modules() if isinstance(one, AwqLinear)), None)
    if layer is not None:
        for n_rows in (1, MANY_ROWS):
            layer(torch.zeros(n_rows, layer.in_features, device=layer.scales.device).half())


class AwqLinear(torch.nn.Module):
    """y = x W^T + b with W in 4 bits; made from an nn.Linear, which is left as it is.

    `qweight`: int32, shape (in, out / 8). `qzeros`: int32, (in / 128, out / 8). `scales`: float16,
    (in / 128, out). Parameters, so that what counts a model's weights finds them.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.qweight, self.qzeros, self.scales = map(_constant, quantized(linear.weight.detach()))
        self.bias = None if linear.bias is None else _constant(linear.bias.detach().half())
        # the kernel masks what lies behind the last input without saying what to read there
        self._split_k = 8 if self.in_features % (8 * BLOCK_K) == 0 else 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: shape (..., in), any float; (..., out) in the same type, computed in float16."""
        rows = x.reshape(-1, self.in_features).half().contiguous()
        if len(rows) < MANY_ROWS:
            made = kernels().gemm(rows, self.qweight, self.scales, self.qzeros, self._split_k)
        else:
            made = rows @ kernels().dequantize(self.qweight, self.scales, self.qzeros)
        if self.bias is not None:
            made += self.bias
        return made.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _constant(values: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(values, requires_grad=False)


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(qweight, qzeros, scales) of `weight`, shape (out, in), rounded to nearest.

    A weight is (code - zero) * scale. A group's scale is its range, zero included, over 15 steps:
    with zero in it, the zero's own code is always one of 0..15.
    """
    out_features, in_features = weight.shape
    groups = weight.t().float().reshape(in_features // GROUP, GROUP, out_features)
    low = groups.amin(1).clamp(max=0)
    high = groups.amax(1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=SMALLEST_SCALE).half()
    step = scales.float()  # as it is stored: codes make up for its rounding
    zeros = (-low / step).round().clamp(0, 15)
    codes = (groups / step[:, None]).round_().add_(zeros[:, None]).clamp_(0, 15)
    return packed(codes.reshape(in_features, out_features)), packed(zeros), scales.contiguous()


def packed(codes: torch.Tensor) -> torch.Tensor:
    """int32, shape (n, out / 8), of codes 0..15, shape (n, out): 8 outputs each, in `ORDER`."""
    eights = codes.to(torch.int32).reshape(len(codes), -1, CODES)
    made = torch.zeros_like(eights[..., 0])
    for nibble, at in enumerate(ORDER):
        made |= eights[..., at] << (4 * nibble)
    return made.contiguous()
